-- The tables of a store, version 1. The truth of a row is its bytes (docs/design/checkpoints.md); the columns beside them are
-- for people, and for nothing else. Times are milliseconds since 1970.
PRAGMA application_id = 0x63616e6f; -- "cano"
PRAGMA user_version = 1;

-- The last fence that was drawn. None is drawn twice, not even for an id that was forgotten and begun anew.
CREATE TABLE fences (last INTEGER NOT NULL) STRICT;
INSERT INTO fences VALUES (0);

-- One row for each open store that has claimed something, so that keeping all of its leases alive is one write.
CREATE TABLE owners (
    owner TEXT PRIMARY KEY,
    lease_until INTEGER NOT NULL
) STRICT;

CREATE TABLE runs (
    run INTEGER PRIMARY KEY,
    workflow_id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    owner TEXT, -- null: nobody
    fence INTEGER NOT NULL,
    workflow TEXT NOT NULL,
    version INTEGER NOT NULL,
    state TEXT NOT NULL, -- of the last row
    next_sequence INTEGER NOT NULL,
    kept_rows INTEGER NOT NULL,
    kept_bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL
) STRICT;
CREATE INDEX runs_by_status ON runs (status);
CREATE INDEX runs_by_owner ON runs (owner) WHERE owner IS NOT NULL;

-- The numbers of runs are short and the rows lie in the order of their commits: the rows of a thousand runs that are written
-- together go to a few pages, not to a thousand.
CREATE TABLE rows (
    run INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    task TEXT NOT NULL,
    visit INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    next_state TEXT,
    recorded_at INTEGER NOT NULL,
    row BLOB NOT NULL,
    UNIQUE (run, sequence)
) STRICT;

CREATE VIEW log AS
SELECT workflow_id, sequence, kind, rows.state, task, visit, attempt, next_state,
    strftime('%Y-%m-%d %H:%M:%f', recorded_at / 1000.0, 'unixepoch') AS recorded_at, length(row) AS bytes
FROM rows JOIN runs USING (run)
ORDER BY run, sequence;
