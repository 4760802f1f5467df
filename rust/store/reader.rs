//! The reading connection, which sees what has been committed and disturbs nobody.

use rusqlite::types::Type;
use rusqlite::{Connection, OptionalExtension, params};

use super::connection::{number, standing};
use super::error::StoreError;
use super::file::Presence;
use crate::core::checkpoint::{Problem, Row, RowError, WorkflowId, check_log};
use crate::core::claim::{RunFilter, RunSummary};

pub(super) struct Reader {
    connection: Connection,
    _presence: Presence, // ends when the store is closed, and after the connections
}

impl Reader {
    pub fn new(connection: Connection, presence: Presence) -> Self {
        Self { connection, _presence: presence }
    }

    /// The rows of a run in ascending order, complete and undamaged; none if there is no such run.
    pub fn load_run(&mut self, id: &WorkflowId) -> Result<Vec<Row>, StoreError> {
        let moment = self.connection.transaction()?; // both questions are answered as of one commit
        let known: Option<(i64, i64)> = moment
            .prepare_cached("SELECT run, next_sequence FROM runs WHERE workflow_id = ?")?
            .query_row([id.as_str()], |found| Ok((found.get(0)?, found.get(1)?)))
            .optional()?;
        let Some((run, next)) = known else { return Ok(Vec::new()) };
        let mut statement = moment.prepare_cached("SELECT sequence, row FROM rows WHERE run = ? ORDER BY sequence")?;
        let mut stored = statement.query([run])?;
        let mut rows = Vec::new();
        while let Some(found) = stored.next()? {
            let sequence: i64 = found.get(0)?;
            let bytes = found.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?;
            rows.push(Row::decode(id, sequence.cast_unsigned(), bytes)?);
        }
        check_log(id, &rows)?;
        let end = rows.last().map_or(0, |row| row.sequence + 1);
        if end != next.cast_unsigned() {
            return Err(RowError { id: id.clone(), sequence: end, problem: Problem::Missing }.into());
        }
        Ok(rows)
    }

    /// The runs that the filter lets through, the longest untouched first.
    pub fn list_runs(&mut self, filter: &RunFilter) -> Result<Vec<RunSummary>, StoreError> {
        let names: Vec<_> = filter.statuses.iter().map(|status| format!("\"{}\"", status.name())).collect();
        let mut statement = self.connection.prepare_cached(
            "SELECT status, runs.owner, lease_until, fence, next_sequence, kept_rows, kept_bytes,
                 workflow_id, workflow, version, state, created_at, updated_at
             FROM runs LEFT JOIN owners USING (owner)
             WHERE status IN (SELECT value FROM json_each(?)) AND updated_at < ?
             ORDER BY updated_at, run LIMIT ?",
        )?;
        let wanted = params![format!("[{}]", names.join(",")), number(filter.updated_before), filter.limit];
        statement.query_map(wanted, summary)?.map(|found| Ok(found?)).collect()
    }
}

fn summary(found: &rusqlite::Row<'_>) -> rusqlite::Result<RunSummary> {
    let id: String = found.get("workflow_id")?;
    let id =
        WorkflowId::new(&id).map_err(|error| rusqlite::Error::FromSqlConversionFailure(7, Type::Text, error.into()))?;
    let time = |column| found.get(column).map(i64::cast_unsigned);
    Ok(RunSummary {
        id,
        standing: standing(found)?,
        workflow: found.get("workflow")?,
        version: found.get("version")?,
        state: found.get("state")?,
        created_at: time("created_at")?,
        updated_at: time("updated_at")?,
    })
}
