//! What can go wrong between a row and the disk.

use std::fmt;
use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

use crate::core::checkpoint::{RowError, WorkflowId};
use crate::core::claim::Refusal;

/// Why an operation was not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreError {
    /// The store could not be opened.
    Open { path: PathBuf, reason: OpenReason },
    /// What was asked may not be done.
    Refused { id: WorkflowId, refusal: Refusal },
    /// The row cannot be written, or what is stored cannot be read.
    Row(RowError),
    /// SQLite failed. Whoever waited for the same transaction has the same error, and nothing of it
    /// was done, unless the disk says one thing and does another: a row that is sent again is then a
    /// `Conflict` with the same bytes.
    Failed { failure: Failure, text: String },
    /// The store is closed.
    Closed,
    /// The store was opened by the parent of this process.
    Forked,
}

/// What kind of failure it is, for those who decide whether to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    DiskFull,
    /// Somebody else had the file locked for too long.
    Busy,
    Io,
    /// The file is not what SQLite wrote, or not what this store wrote.
    Damaged,
    ReadOnly,
    Other,
}

/// Why a file cannot be a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpenReason {
    /// The path does not end with the name of a file.
    NoName,
    DirectoryMissing(PathBuf),
    /// Others may write to the directory, so they could put another file there.
    DirectoryInsecure {
        directory: PathBuf,
        mode: u32,
    },
    Symlink(PathBuf),
    NotAFile(PathBuf),
    /// The file is another user's.
    OtherOwner {
        file: PathBuf,
        owner: u32,
        user: u32,
    },
    /// Others may write to the file.
    FileInsecure {
        file: PathBuf,
        mode: u32,
    },
    /// An SQLite file, but of another program.
    NotAStore,
    /// A store of a later version of cano.
    Version {
        version: i64,
    },
    /// The parent of this process had the file open when it forked.
    Forked,
    /// The file system cannot share memory between processes, as most network file systems cannot.
    NoWal,
    Failed {
        failure: Failure,
        text: String,
    },
}

impl fmt::Display for OpenReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoName => f.write_str("the path must end with the name of a file"),
            Self::DirectoryMissing(directory) => write!(f, "there is no directory {}", shown(directory)),
            Self::DirectoryInsecure { directory, mode } => {
                write!(f, "others may write to the directory {} (mode {mode:04o})", shown(directory))
            }
            Self::Symlink(file) => write!(f, "{} is a symbolic link", shown(file)),
            Self::NotAFile(file) => write!(f, "{} is not a file", shown(file)),
            Self::OtherOwner { file, owner, user } => {
                write!(f, "{} belongs to user {owner}, and this process is user {user}", shown(file))
            }
            Self::FileInsecure { file, mode } => write!(f, "others may write to {} (mode {mode:04o})", shown(file)),
            Self::NotAStore => f.write_str("it is a database of another program"),
            Self::Version { version } => {
                write!(f, "it is a store of version {version}, and this version of cano reads version 1")
            }
            Self::Forked => f.write_str("it was open when this process was forked; open it after the fork only"),
            Self::NoWal => f.write_str("its file system has no shared memory; use a local disk"),
            Self::Failed { text, .. } => f.write_str(text),
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open { path, reason } => write!(f, "cannot open the store {}: {reason}", shown(path)),
            Self::Refused { id, refusal } => write!(f, "run {:?} {refusal}", id.as_str()),
            Self::Row(error) => error.fmt(f),
            Self::Failed { failure, text } => match failure {
                Failure::DiskFull => write!(f, "the disk of the store is full: {text}"),
                Failure::Busy => write!(f, "another process kept the store locked: {text}"),
                Failure::Io | Failure::Damaged | Failure::ReadOnly | Failure::Other => {
                    write!(f, "the store failed: {text}")
                }
            },
            Self::Closed => f.write_str("the store is closed"),
            Self::Forked => {
                f.write_str("the store was opened before this process was forked; open it after the fork only")
            }
        }
    }
}

impl std::error::Error for StoreError {}

impl From<RowError> for StoreError {
    fn from(error: RowError) -> Self {
        Self::Row(error)
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Failed { failure: failure_of(&error), text: error.to_string() }
    }
}

impl From<rusqlite::Error> for OpenReason {
    fn from(error: rusqlite::Error) -> Self {
        Self::Failed { failure: failure_of(&error), text: error.to_string() }
    }
}

impl From<std::io::Error> for OpenReason {
    fn from(error: std::io::Error) -> Self {
        let failure = match error.kind() {
            std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => Failure::ReadOnly,
            std::io::ErrorKind::StorageFull => Failure::DiskFull,
            _ => Failure::Io,
        };
        Self::Failed { failure, text: error.to_string() }
    }
}

fn failure_of(error: &rusqlite::Error) -> Failure {
    if let rusqlite::Error::FromSqlConversionFailure(..) | rusqlite::Error::InvalidColumnType(..) = error {
        return Failure::Damaged;
    }
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => Failure::DiskFull,
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => Failure::Busy,
        Some(ErrorCode::SystemIoFailure) => Failure::Io,
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Failure::Damaged,
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => Failure::ReadOnly,
        _ => Failure::Other,
    }
}

/// A path as errors show it: control characters escaped.
fn shown(path: &Path) -> String {
    format!("{:?}", path.display().to_string())
}
