//! What is known of this machine: processor, cores, caches, memory. Read from Linux's files; unknown elsewhere.

mod peaks;

use std::{fs, path::Path};

use serde::Serialize;

pub(crate) use peaks::Peaks;

/// Processor, caches and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Machine {
    /// Name of the processor, `unknown` where the system does not tell.
    pub(crate) processor: String,
    /// Cores that this process may use.
    pub(crate) usable_cores: Vec<usize>,
    /// Caches of the first core, the smallest first.
    pub(crate) caches: Vec<Cache>,
    /// Bytes of memory; 0 where unknown.
    pub(crate) memory_bytes: u64,
    /// Bytes of memory that programs can get now; 0 where unknown.
    pub(crate) memory_available_bytes: u64,
    /// When the system uses huge pages: `always`, `madvise`, `never` or `unknown`.
    pub(crate) huge_pages: String,
}

/// One cache of the first core.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Cache {
    /// 1, 2 or 3.
    pub(crate) level: u32,
    /// Bytes.
    pub(crate) bytes: u64,
    /// Cores that share it.
    pub(crate) shared_by: usize,
}

impl Machine {
    /// Asks the system.
    pub(crate) fn read() -> Self {
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kilobytes = |key| field(&memory, key).and_then(|value| value.split(' ').next()?.parse().ok());
        let bytes = |key| kilobytes(key).map_or(0, |count: u64| count * 1024);
        let huge = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
        Self {
            processor: processor(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
            usable_cores: usable_cores(),
            caches: caches(),
            memory_bytes: bytes("MemTotal"),
            memory_available_bytes: bytes("MemAvailable"),
            huge_pages: chosen(&huge),
        }
    }

    /// Bytes of the largest cache; 32 MiB where unknown.
    pub(crate) fn last_cache_bytes(&self) -> u64 {
        self.caches.iter().map(|cache| cache.bytes).max().unwrap_or(32 << 20)
    }
}

/// Bytes that programs of this user can still write to the disk of `folder`, or of the folder that it would be made in.
pub(crate) fn free_disk_bytes(folder: &Path) -> Option<u64> {
    let existing = folder.ancestors().find(|folder| folder.exists())?;
    let disk = rustix::fs::statvfs(existing).ok()?;
    Some(disk.f_bavail * disk.f_frsize)
}

/// Most memory that this process held since [`reset_peak_rss`] or its start, in bytes; `None` where unknown.
pub(crate) fn peak_rss_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes: u64 = field(&status, "VmHWM")?.split(' ').next()?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// Starts the measurement of [`peak_rss_bytes`] afresh, where the system can.
pub(crate) fn reset_peak_rss() {
    // Where it cannot, the figure is that of the whole process so far, which is what the report calls it.
    drop(fs::write("/proc/self/clear_refs", "5"));
}

/// Cores that this process may use; empty where unknown.
pub(crate) fn usable_cores() -> Vec<usize> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    field(&status, "Cpus_allowed_list").and_then(|list| parse_cores(list).ok()).unwrap_or_default()
}

/// Reads a list of cores such as `0-3,6`, in its order and without repetitions.
pub(crate) fn parse_cores(list: &str) -> Result<Vec<usize>, String> {
    let mut cores = Vec::new();
    for part in list.split(',').map(str::trim) {
        if part.is_empty() && list.trim().is_empty() {
            continue;
        }
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) else {
            return Err(format!("`{part}` is neither a core nor a range of cores; hint: write `0-3,6`"));
        };
        if first > last || last >= CORES_MAX {
            return Err(format!("`{part}` is no range of cores from 0 to {}", CORES_MAX - 1));
        }
        for core in first..=last {
            if !cores.contains(&core) {
                cores.push(core);
            }
        }
    }
    Ok(cores)
}

/// Cores of the largest machine that a list may speak of.
const CORES_MAX: usize = 1_024;

/// Ascending cores as a list that [`parse_cores`] reads, ranges drawn together.
pub(crate) fn describe_cores(cores: &[usize]) -> String {
    let ranges = cores.chunk_by(|a, b| a + 1 == *b).map(|range| match range {
        [only] => only.to_string(),
        [first, .., last] => format!("{first}-{last}"),
        [] => String::new(),
    });
    ranges.collect::<Vec<_>>().join(",")
}

/// Value of `key: value` lines.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then_some(value.trim())
    })
}

fn processor(cpuinfo: &str) -> String {
    // x86 names the model; other processors leave it to the device tree's or the vendor's number.
    let named = field(cpuinfo, "model name").or_else(|| field(cpuinfo, "Model"));
    named.filter(|name| !name.is_empty()).map_or_else(|| "unknown".to_owned(), str::to_owned)
}

/// The word in brackets of `always [madvise] never`.
fn chosen(choices: &str) -> String {
    let bracketed = choices.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    bracketed.map_or_else(|| "unknown".to_owned(), |(word, _)| word.to_owned())
}

fn caches() -> Vec<Cache> {
    let mut caches = Vec::new();
    for index in 0..8 {
        let text = |name: &str| {
            let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{name}");
            fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
        };
        let (Ok(level), Some(bytes)) = (text("level").parse(), size(&text("size"))) else { continue };
        if text("type") != "Instruction" {
            let shared_by = parse_cores(&text("shared_cpu_list")).map_or(1, |cores| cores.len().max(1));
            caches.push(Cache { level, bytes, shared_by });
        }
    }
    caches.sort_by_key(|cache| cache.level);
    caches
}

/// `32K` or `16M` in bytes.
fn size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    Some(digits.parse::<u64>().ok()? * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cores_are_read_and_written() {
        assert_eq!(parse_cores("0-3,6"), Ok(vec![0, 1, 2, 3, 6]));
        assert_eq!(parse_cores(" 6 , 1-2,1"), Ok(vec![6, 1, 2]));
        assert_eq!(parse_cores(""), Ok(Vec::new()));
        for bad in ["1,", "-", "2-1", "a", "1-b", "0-100000"] {
            assert!(parse_cores(bad).is_err(), "{bad}");
        }
        assert_eq!(describe_cores(&[0, 1, 2, 3, 6]), "0-3,6");
        assert_eq!(describe_cores(&[]), "");
    }

    #[test]
    fn what_the_system_says_is_understood() {
        let cpuinfo = "processor\t: 0\nmodel name\t: AMD EPYC\ncache size\t: 1024 KB\n";
        assert_eq!(processor(cpuinfo), "AMD EPYC");
        assert_eq!(processor(""), "unknown");
        assert_eq!(chosen("always [madvise] never\n"), "madvise");
        assert_eq!(chosen(""), "unknown");
        assert_eq!(
            (size("32K"), size("16M"), size("512"), size("x")),
            (Some(32 << 10), Some(16 << 20), Some(512), None)
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_is_known() {
        let machine = Machine::read();
        assert!(!machine.usable_cores.is_empty() && machine.memory_bytes > 0, "{machine:?}");
        assert!(machine.memory_available_bytes <= machine.memory_bytes, "{machine:?}");
        assert!(peak_rss_bytes().is_some_and(|bytes| bytes > 1 << 20));
    }
}
