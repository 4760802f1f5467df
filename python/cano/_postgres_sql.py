"""The tables and statements of `PostgresCheckpointStore`; ``{schema}`` stands for the quoted name of its schema.

The truth of a row is its bytes (docs/design/checkpoints.md); the columns beside them are for people, but for those that a
cursor is compared by when it takes the place of another. Times are the database's. Each statement does many operations at
once and says which of them it did, by their place in the arrays; it leaves out what may not be done.

Four rules keep what is written right:

- A row is added by the statement that updates its run, under the condition that the fence is still the run's. Whoever
  takes the run over changes the same tuple: one of the two waits for the other, and then sees what it did. A statement
  that only looked at the fence could commit behind the back of the new owner.
- The statements of a turn share a sync of the disk: all but the last are told not to wait for it, and all are answered when
  the last has waited. The log is written in order, so that what came before is on the disk then.
- A claim passes over tuples that are locked and asks again later. So it never waits while it holds others, and no circle
  of waiting can form between a claim and an append of many runs.
- A claim looks first and locks then, and what it locks must have the fence that it has seen. PostgreSQL gives it the newest
  version of a run, but beside it the lease as it was seen first, of the owner that the run had then.
"""

# ruff: noqa: S608 - nothing of a user's goes into these texts but the name of the schema, which is checked and quoted

VERSION = 1
"""Of the tables that this module reads and writes."""

MIGRATIONS: dict[int, str] = {
    1: """
CREATE SEQUENCE {schema}.fences;

-- One row for each open store, so that keeping all of its leases alive is one write.
CREATE TABLE {schema}.owners (
    owner text PRIMARY KEY,
    lease_until timestamptz NOT NULL,
    joined_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

CREATE TABLE {schema}.runs (
    run bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    workflow_id text NOT NULL UNIQUE,
    status text NOT NULL,
    owner text, -- null: nobody
    fence bigint NOT NULL,
    ticket bytea, -- of the claim, so that a claim whose answer was lost is known again
    workflow text NOT NULL,
    version bigint NOT NULL,
    state text NOT NULL, -- of the last row
    next_sequence bigint NOT NULL,
    kept_rows bigint NOT NULL,
    kept_bytes bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 70); -- an update that finds room on its page touches no index
CREATE INDEX runs_by_owner ON {schema}.runs (owner) WHERE owner IS NOT NULL;
CREATE INDEX runs_not_over ON {schema}.runs (status) WHERE status IN ('running', 'rolling back', 'stopped');

CREATE TABLE {schema}.rows (
    run bigint NOT NULL,
    sequence bigint NOT NULL,
    kind text NOT NULL,
    state text NOT NULL,
    task text NOT NULL,
    visit bigint NOT NULL,
    attempt bigint NOT NULL,
    next_state text,
    refers_to bigint,
    run_id bytea NOT NULL,
    recorded_at timestamptz NOT NULL,
    row bytea NOT NULL,
    PRIMARY KEY (run, sequence)
);

CREATE VIEW {schema}.log AS
SELECT r.workflow_id, x.sequence, x.kind, x.state, x.task, x.visit, x.attempt, x.next_state, x.recorded_at,
    octet_length(x.row) AS bytes
FROM {schema}.rows AS x JOIN {schema}.runs AS r USING (run)
ORDER BY r.run, x.sequence;
""",
}

SETTINGS = """
SET jit = off;
SET plan_cache_mode = force_generic_plan; -- planning would take longer than doing
SET enable_hashjoin = off; -- everything is looked up by its key, also while the planner still takes the tables for small
SET enable_mergejoin = off;
SET enable_seqscan = off;
SET lock_timeout = {lock_timeout};
SET statement_timeout = {statement_timeout};
"""
"""Of the connection that writes; times are milliseconds."""

SYNC = """
SELECT CASE setting WHEN 'off' THEN 'on' ELSE setting END FROM current_setting('synchronous_commit') AS setting
"""
"""How the connection waits for the disk: what was answered is there, whatever the server does by default."""

HAS_VERSIONS = "SELECT to_regclass('{schema}.versions') IS NOT NULL"
HAS_SCHEMA = "SELECT to_regnamespace('{schema}') IS NOT NULL"
STORED_VERSION = "SELECT coalesce(max(version), 0) FROM {schema}.versions"
CREATE_SCHEMA = "CREATE SCHEMA {schema}"
CREATE_VERSIONS = """
CREATE TABLE IF NOT EXISTS {schema}.versions (version int PRIMARY KEY, migrated_at timestamptz NOT NULL DEFAULT now())
"""
ADD_VERSION = "INSERT INTO {schema}.versions VALUES ($1)"
LOCK_MIGRATIONS = "SELECT pg_advisory_xact_lock($1)"

BEAT = """
WITH sync AS MATERIALIZED (SELECT set_config('synchronous_commit', $3, true)), u AS (
    INSERT INTO {schema}.owners AS o (owner, lease_until) VALUES ($1, now() + $2::interval)
    ON CONFLICT (owner) DO UPDATE SET lease_until = greatest(o.lease_until, excluded.lease_until)
    RETURNING owner
)
SELECT FROM u, sync
"""

FORGET_OWNERS = """
DELETE FROM {schema}.owners AS o
WHERE lease_until < now() - interval '1 hour' AND NOT EXISTS (SELECT FROM {schema}.runs AS r WHERE r.owner = o.owner)
"""

LEAVE_RUNS = "UPDATE {schema}.runs SET owner = NULL, updated_at = now() WHERE owner = $1"
LEAVE = "DELETE FROM {schema}.owners WHERE owner = $1"

START = """
WITH sync AS MATERIALIZED (SELECT set_config('synchronous_commit', $6, true)), u AS (
    INSERT INTO {schema}.runs
        (workflow_id, status, owner, fence, ticket, workflow, version, state, next_sequence, kept_rows, kept_bytes)
    SELECT workflow_id, 'running', $1, nextval('{schema}.fences'), ticket, workflow, version, '', 0, 0, 0
    FROM unnest($2::text[], $3::bytea[], $4::text[], $5::bigint[]) AS e (workflow_id, ticket, workflow, version)
    ORDER BY workflow_id -- two statements that start the same runs wait for each other in one order
    ON CONFLICT (workflow_id) DO NOTHING
    RETURNING workflow_id, fence
)
SELECT workflow_id, fence FROM u, sync
"""

CLAIM = """
WITH e AS MATERIALIZED (
    SELECT * FROM unnest($2::text[], $3::bytea[]) AS e (workflow_id, ticket)
), seen AS MATERIALIZED (
    SELECT r.run, r.fence, e.ticket
    FROM e JOIN {schema}.runs AS r USING (workflow_id) LEFT JOIN {schema}.owners AS o ON o.owner = r.owner
    WHERE r.owner IS NULL OR o.lease_until IS NULL OR o.lease_until <= now()
), found AS MATERIALIZED (
    SELECT r.run, seen.ticket FROM seen JOIN {schema}.runs AS r ON r.run = seen.run
    WHERE r.fence = seen.fence AND r.status IN ('running', 'rolling back', 'stopped')
    FOR UPDATE OF r SKIP LOCKED
), u AS (
    UPDATE {schema}.runs AS r
    SET status = CASE r.status WHEN 'stopped' THEN 'running' ELSE r.status END,
        owner = $1, fence = nextval('{schema}.fences'), ticket = found.ticket, updated_at = now()
    FROM found WHERE r.run = found.run
    RETURNING r.workflow_id, r.fence
), sync AS MATERIALIZED (SELECT set_config('synchronous_commit', $4, true))
SELECT workflow_id, fence FROM u, sync
"""

_ENTRIES = """
WITH sync AS MATERIALIZED (SELECT set_config('synchronous_commit', $19, true)), e AS MATERIALIZED (
    SELECT *, octet_length(row) AS bytes,
        to_timestamp(recorded_at / 1000.0) AS moment
    FROM unnest(
        $1::text[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::bigint[],
        $10::bigint[], $11::text[], $12::bigint[], $13::bytea[], $14::bigint[], $15::bigint[], $16::bytea[]
    ) WITH ORDINALITY AS e (
        workflow_id, fence, sequence, if_running, if_rolling_back, kind, state, task, visit,
        attempt, next_state, refers_to, run_id, recorded_at, version, row, place
    )
)"""

_MAY_FOLLOW = """
    CASE WHEN e.fence IS NULL THEN r.owner IS NULL ELSE r.fence = e.fence AND r.owner IS NOT NULL END
    AND r.next_sequence = e.sequence
    AND CASE r.status WHEN 'running' THEN e.if_running WHEN 'rolling back' THEN e.if_rolling_back END IS NOT NULL
    AND r.kept_rows < $17 AND r.kept_bytes + e.bytes <= $18
"""

_AFTER = """
    status = CASE r.status WHEN 'running' THEN e.if_running ELSE e.if_rolling_back END,
    owner = CASE
        WHEN CASE r.status WHEN 'running' THEN e.if_running ELSE e.if_rolling_back END IN ('running', 'rolling back')
        THEN r.owner
    END,
    state = e.state, version = e.version, next_sequence = e.sequence + 1, updated_at = now()"""

_INSERT = """
INSERT INTO {schema}.rows
SELECT run, sequence, kind, state, task, visit, attempt, next_state, refers_to, run_id, moment, row FROM u
"""

BEGIN = (
    _ENTRIES
    + """, u AS (
    INSERT INTO {schema}.runs
        (workflow_id, status, fence, workflow, version, state, next_sequence, kept_rows, kept_bytes)
    SELECT workflow_id, if_running, 0, '', version, state, 1, 1, bytes FROM e
    WHERE if_running IS NOT NULL AND 0 < $17 AND bytes <= $18
    ORDER BY workflow_id
    ON CONFLICT (workflow_id) DO NOTHING
    RETURNING run, workflow_id
), i AS (
    INSERT INTO {schema}.rows
    SELECT run, sequence, kind, state, task, visit, attempt, next_state, refers_to, run_id, moment, row
    FROM e JOIN u USING (workflow_id)
)
SELECT place FROM sync, e JOIN u USING (workflow_id)
"""
)
"""Row 0 of runs that nobody has claimed and that are not there yet."""

APPEND = (
    _ENTRIES
    + ", u AS (UPDATE {schema}.runs AS r SET"
    + _AFTER
    + """, kept_rows = r.kept_rows + 1, kept_bytes = r.kept_bytes + e.bytes
    FROM e WHERE r.workflow_id = e.workflow_id AND """
    + _MAY_FOLLOW
    + "RETURNING r.run, e.*), i AS ("
    + _INSERT
    + ") SELECT place FROM u, sync"
)

REPLACE = (
    _ENTRIES
    + ", u AS (UPDATE {schema}.runs AS r SET"
    + _AFTER
    + """, kept_bytes = r.kept_bytes + e.bytes - octet_length(p.row)
    FROM e JOIN {schema}.runs AS q ON q.workflow_id = e.workflow_id
        JOIN {schema}.rows AS p ON p.run = q.run AND p.sequence = e.sequence - 1
    WHERE r.run = q.run
        AND (p.kind, p.visit, p.state, p.run_id) = (e.kind, e.visit, e.state, e.run_id)
        AND coalesce(p.refers_to, p.sequence) = e.refers_to
        AND """
    + _MAY_FOLLOW
    + "RETURNING r.run, e.*), i AS ("
    + _INSERT
    + """), d AS (
    DELETE FROM {schema}.rows AS p USING u WHERE p.run = u.run AND p.sequence = u.sequence - 1
)
SELECT place FROM u, sync
"""
)
"""Cursors that take the place of the cursor before them."""

RELEASE = """
WITH sync AS MATERIALIZED (SELECT set_config('synchronous_commit', $4, true)), u AS (
    UPDATE {schema}.runs AS r
    SET status = CASE WHEN e.stopped AND r.status = 'running' THEN 'stopped' ELSE r.status END,
        owner = NULL, updated_at = now()
    FROM unnest($1::text[], $2::bigint[], $3::bool[]) WITH ORDINALITY AS e (workflow_id, fence, stopped, place)
    WHERE r.workflow_id = e.workflow_id AND r.fence = e.fence AND r.owner IS NOT NULL
    RETURNING e.place
)
SELECT place FROM u, sync
"""

CLEAR = """
WITH sync AS MATERIALIZED (SELECT set_config('synchronous_commit', $3, true)), seen AS MATERIALIZED (
    SELECT r.run, r.fence, e.place
    FROM unnest($1::text[], $2::bigint[]) WITH ORDINALITY AS e (workflow_id, fence, place)
        JOIN {schema}.runs AS r USING (workflow_id) LEFT JOIN {schema}.owners AS o ON o.owner = r.owner
    WHERE CASE
        WHEN e.fence IS NULL THEN r.owner IS NULL OR o.lease_until IS NULL OR o.lease_until <= now()
        ELSE r.fence = e.fence
    END
), found AS MATERIALIZED (
    SELECT r.run, seen.place FROM seen JOIN {schema}.runs AS r ON r.run = seen.run
    WHERE r.fence = seen.fence
    FOR UPDATE OF r SKIP LOCKED
), x AS (
    DELETE FROM {schema}.rows AS x USING found WHERE x.run = found.run RETURNING x.run
), u AS (
    DELETE FROM {schema}.runs AS r USING found WHERE r.run = found.run RETURNING r.run, r.kept_rows, found.place
)
SELECT run, place, kept_rows - (SELECT count(*) FROM x WHERE x.run = u.run) AS left_over FROM u, sync
"""

CLEAR_ROWS = "DELETE FROM {schema}.rows WHERE run = ANY ($1::bigint[])"
"""For what `CLEAR` could not see: rows that were added between its beginning and its turn at the run."""

STANDINGS = """
SELECT e.place, r.workflow_id, r.status, r.owner, r.fence, r.ticket, r.next_sequence, r.kept_rows, r.kept_bytes,
    (extract(epoch FROM o.lease_until) * 1000)::bigint AS until, x.row,
    (extract(epoch FROM now()) * 1000)::bigint AS now
FROM unnest($1::text[], $2::bigint[]) WITH ORDINALITY AS e (workflow_id, sequence, place)
    JOIN {schema}.runs AS r USING (workflow_id)
    LEFT JOIN {schema}.owners AS o ON o.owner = r.owner
    LEFT JOIN {schema}.rows AS x ON x.run = r.run AND x.sequence = e.sequence
"""
"""Why something was left out: how each run stands, and the row that is at the place of one that was to be added."""

LOAD = """
SELECT r.next_sequence, x.sequence, x.row
FROM {schema}.runs AS r LEFT JOIN {schema}.rows AS x USING (run)
WHERE r.workflow_id = $1 ORDER BY x.sequence
"""

LIST = """
SELECT r.workflow_id, r.workflow, r.version, r.status, r.state, r.owner, r.fence, r.next_sequence, r.kept_rows, r.kept_bytes,
    (extract(epoch FROM o.lease_until) * 1000)::bigint AS until,
    (extract(epoch FROM r.created_at) * 1000)::bigint AS created_at,
    (extract(epoch FROM r.updated_at) * 1000)::bigint AS updated_at
FROM {schema}.runs AS r LEFT JOIN {schema}.owners AS o ON o.owner = r.owner
WHERE r.status = ANY ($1::text[]) AND ($2::interval IS NULL OR r.updated_at < now() - $2::interval)
ORDER BY r.updated_at, r.run LIMIT $3
"""
