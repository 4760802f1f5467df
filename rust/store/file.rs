//! Makes sure that the file of a store is ours and that nobody else can put another in its place.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::error::OpenReason;

/// Whose files are trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// Files of this process's user, in a directory where nobody else can replace them: others may
    /// not write to it, unless it is sticky.
    Ours,
    /// Files whoever they belong to, wherever they are; but no symbolic links.
    Anyones,
}

/// Creates the file if it is not there, mode 0600, and returns its path without links and dots.
///
/// What SQLite keeps beside the file is looked at as well; what it makes there gets the file's mode.
pub(super) fn prepare(path: &Path, trust: Trust) -> Result<PathBuf, OpenReason> {
    let name = path.file_name().ok_or(OpenReason::NoName)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = parent.canonicalize().map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => OpenReason::DirectoryMissing(parent.to_owned()),
        _ => error.into(),
    })?;
    check_directory(&directory, trust)?;
    let file = directory.join(name);
    match create(&file) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error.into()),
        Ok(()) | Err(_) => {}
    }
    for beside in ["", "-wal", "-shm", "-journal"] {
        let mut name = name.to_owned();
        name.push(beside);
        check_file(directory.join(name), trust)?;
    }
    Ok(file)
}

/// The files that are open, and the process that opened each.
static OPEN: Mutex<Vec<(u32, PathBuf)>> = Mutex::new(Vec::new());

/// That this process has a file open.
///
/// A process that was forked while the file was open has SQLite's belief of holding locks on it, and
/// not the locks: if it opened the file, it would write without any. So it may not.
#[derive(Debug)]
pub(super) struct Presence {
    process: u32,
    file: PathBuf,
}

impl Presence {
    pub fn new(file: &Path) -> Result<Self, OpenReason> {
        Self::of(process::id(), file)
    }

    pub fn of(process: u32, file: &Path) -> Result<Self, OpenReason> {
        let mut open = open_files();
        if open.iter().any(|(other, known)| *other != process && known == file) {
            return Err(OpenReason::Forked);
        }
        open.push((process, file.to_owned()));
        Ok(Self { process, file: file.to_owned() })
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        if self.process != process::id() {
            return; // a child cannot close what its parent has open
        }
        let mut open = open_files();
        if let Some(at) = open.iter().position(|(process, file)| (*process, file) == (self.process, &self.file)) {
            open.swap_remove(at);
        }
    }
}

fn open_files() -> MutexGuard<'static, Vec<(u32, PathBuf)>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn create(file: &Path) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(file).map(drop)
}

fn check_directory(directory: &Path, trust: Trust) -> Result<(), OpenReason> {
    let found = fs::metadata(directory)?;
    if !found.is_dir() {
        return Err(OpenReason::DirectoryMissing(directory.to_owned()));
    }
    match trust {
        Trust::Anyones => Ok(()),
        Trust::Ours => check_mode(directory, &found),
    }
}

fn check_file(file: PathBuf, trust: Trust) -> Result<(), OpenReason> {
    let found = match fs::symlink_metadata(&file) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    if found.is_symlink() {
        return Err(OpenReason::Symlink(file));
    }
    if !found.is_file() {
        return Err(OpenReason::NotAFile(file));
    }
    match trust {
        Trust::Anyones => Ok(()),
        Trust::Ours => check_owner(file, &found),
    }
}

#[cfg(unix)]
const OTHERS_WRITE: u32 = 0o022;
#[cfg(unix)]
const STICKY: u32 = 0o1000;

#[cfg(unix)]
fn check_mode(directory: &Path, found: &fs::Metadata) -> Result<(), OpenReason> {
    let mode = std::os::unix::fs::MetadataExt::mode(found) & 0o7777;
    if mode & OTHERS_WRITE != 0 && mode & STICKY == 0 {
        return Err(OpenReason::DirectoryInsecure { directory: directory.to_owned(), mode });
    }
    Ok(())
}

#[cfg(unix)]
fn check_owner(file: PathBuf, found: &fs::Metadata) -> Result<(), OpenReason> {
    use std::os::unix::fs::MetadataExt;
    let user = rustix::process::geteuid().as_raw();
    if found.uid() != user {
        return Err(OpenReason::OtherOwner { file, owner: found.uid(), user });
    }
    if found.mode() & OTHERS_WRITE != 0 {
        return Err(OpenReason::FileInsecure { file, mode: found.mode() & 0o7777 });
    }
    Ok(())
}

// Windows: a file inherits the rights of its directory, and a user's directories are the user's.
#[cfg(not(unix))]
fn check_mode(_: &Path, _: &fs::Metadata) -> Result<(), OpenReason> {
    Ok(())
}

#[cfg(not(unix))]
fn check_owner(_: PathBuf, _: &fs::Metadata) -> Result<(), OpenReason> {
    Ok(())
}
