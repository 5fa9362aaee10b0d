//! What the processes of a fleet say: kept in a file for each, whose ends are printed when a test fails.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

/// Setting that names a folder in which the files stay after the test.
pub(super) const FOLDER: &str = "LONGSHORE_FLEET_LOGS";
/// Bytes of each file that are printed.
const PRINTED: u64 = 16 << 10;

/// The files, in a folder.
#[derive(Debug)]
pub(super) struct Logs(PathBuf);

impl Logs {
    /// Files in the folder that the setting names, in a part of their own; else in `folder`, with which they go.
    pub(super) fn new(folder: &Path) -> Self {
        let kept = std::env::var_os(FOLDER).filter(|kept| !kept.is_empty());
        let folder = kept.map_or(folder.to_owned(), |kept| {
            let test = std::thread::current().name().unwrap_or("test").replace(':', "-");
            Path::new(&kept).join(format!("{test}-{}", std::process::id()))
        });
        fs::create_dir_all(&folder).expect("the folder of logs can be made");
        Self(folder)
    }

    /// The file of a process; one that is started again goes on in it.
    pub(super) fn of(&self, id: &str) -> File {
        let file = OpenOptions::new().create(true).append(true).open(self.path(id));
        file.expect("a file in a folder of ours can be written")
    }

    fn path(&self, id: &str) -> PathBuf {
        self.0.join(format!("{id}.log"))
    }

    /// Prints the ends of all files.
    #[allow(clippy::print_stderr, reason = "a failed test says what its processes said")]
    pub(super) fn print(&self) {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let mut logs: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| is_log(path)).collect();
        logs.sort();
        for log in logs {
            eprintln!("--- {} said at last:\n{}", log.display(), tail(&log));
        }
    }
}

fn is_log(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "log")
}

/// The end of a file, from the beginning of a line on.
fn tail(path: &Path) -> String {
    let read = || {
        let mut file = File::open(path)?;
        let from = file.metadata()?.len().saturating_sub(PRINTED);
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Ok(match from {
            0 => text,
            _ => text.split_once('\n').map_or(String::new(), |(_, rest)| rest.to_owned()),
        })
    };
    read().unwrap_or_else(|error: std::io::Error| format!("nothing that can be read: {error}"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_end_of_a_long_log_begins_with_a_whole_line() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let logs = Logs(folder.path().to_owned());
        for number in 0..10_000 {
            writeln!(logs.of("kv-0"), "line {number}").expect("the file takes it");
        }
        let end = tail(&logs.path("kv-0"));
        assert!(end.len() <= PRINTED as usize && end.starts_with("line ") && end.ends_with("line 9999\n"));
        writeln!(logs.of("kv-1"), "one line").expect("the file takes it");
        assert_eq!(tail(&logs.path("kv-1")), "one line\n");
        assert!(tail(&logs.path("kv-2")).starts_with("nothing"));
    }
}
