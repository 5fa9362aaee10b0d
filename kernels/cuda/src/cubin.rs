//! What is read out of compiled code: the size of a kernel's argument, and what the assembler says of registers and memory.

use crate::Error;

/// What a kernel takes of a multiprocessor, from the assembler's report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resources {
    /// The `extern "C"` function.
    pub entry: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Local memory of a thread: arrays that did not become registers, and spilled registers.
    pub stack_bytes: u32,
    /// Bytes of spilled registers that are written.
    pub spill_store_bytes: u32,
    /// Bytes of spilled registers that are read.
    pub spill_load_bytes: u32,
    /// Static shared memory; ours is dynamic.
    pub static_shared_bytes: u32,
}

/// Reads the report of `ptxas -v`, one per entry, in its order.
pub fn resources(log: &str) -> Vec<Resources> {
    let mut found: Vec<Resources> = Vec::new();
    for line in log.lines() {
        if let Some(rest) = after(line, "Compiling entry function '") {
            let entry = rest.split('\'').next().unwrap_or_default().to_owned();
            found.push(Resources {
                entry,
                registers: 0,
                stack_bytes: 0,
                spill_store_bytes: 0,
                spill_load_bytes: 0,
                static_shared_bytes: 0,
            });
        }
        let Some(entry) = found.last_mut() else { continue };
        // Functions that were not inlined have lines of their own: what they spill counts as the entry's.
        entry.stack_bytes += before(line, " bytes stack frame");
        entry.spill_store_bytes += before(line, " bytes spill stores");
        entry.spill_load_bytes += before(line, " bytes spill loads");
        entry.static_shared_bytes += before(line, " bytes smem");
        entry.registers = entry.registers.max(before(line, " registers"));
    }
    found
}

fn after<'a>(line: &'a str, sign: &str) -> Option<&'a str> {
    line.find(sign).map(|at| &line[at + sign.len()..])
}

/// The number just before `sign`; 0 where there is none.
fn before(line: &str, sign: &str) -> u32 {
    let Some(at) = line.find(sign) else { return 0 };
    let start = line[..at].rfind(|c: char| !c.is_ascii_digit()).map_or(0, |last| last + 1);
    line[start..at].parse().unwrap_or(0)
}

/// Bytes of the argument of `entry`, from the ELF section `.nv.info.<entry>`: its attribute `PARAM_CBANK` holds offset and size
/// of the arguments in constant memory. Every number in the file is distrusted.
pub fn argument_bytes(cubin: &[u8], entry: &str) -> Result<usize, Error> {
    let refuse = |problem: &str| Error::Kernel { kernel: entry.to_owned(), problem: problem.to_owned() };
    let elf = Elf::read(cubin).ok_or_else(|| refuse("was compiled to something that is no cubin"))?;
    let wanted = format!(".nv.info.{entry}");
    let info =
        elf.section(&wanted).ok_or_else(|| refuse("is not in the code that its source was compiled to"))?;
    parameters(info).ok_or_else(|| refuse("tells no size of its argument"))
}

const PARAM_CBANK: u8 = 0x0a;
/// An attribute whose 16-bit value is the length of what follows; all others are four bytes.
const SIZED: u8 = 4;

fn parameters(mut info: &[u8]) -> Option<usize> {
    while let [format, attribute, low, high, rest @ ..] = info {
        let value = usize::from(u16::from_le_bytes([*low, *high]));
        let length = if *format == SIZED { value } else { 0 };
        let payload = rest.get(..length)?;
        if *format == SIZED && *attribute == PARAM_CBANK {
            return payload.get(6..8).map(|size| usize::from(u16::from_le_bytes([size[0], size[1]])));
        }
        info = &rest[length..];
    }
    None
}

/// A 64-bit little-endian ELF file.
struct Elf<'a> {
    bytes: &'a [u8],
    headers: Vec<Header>,
    names: usize,
}

struct Header {
    name: usize,
    offset: usize,
    size: usize,
}

impl<'a> Elf<'a> {
    fn read(bytes: &'a [u8]) -> Option<Self> {
        const HEADER: usize = 64;
        if bytes.get(..6)? != b"\x7fELF\x02\x01" {
            return None;
        }
        let table = usize::try_from(u64_at(bytes, 0x28)?).ok()?;
        let (count, names) = (usize::from(u16_at(bytes, 0x3c)?), usize::from(u16_at(bytes, 0x3e)?));
        let headers = (0..count).map(|index| {
            let at = table.checked_add(index * HEADER)?;
            let header = bytes.get(at..at.checked_add(HEADER)?)?;
            let field = |offset| u64_at(header, offset).and_then(|field| usize::try_from(field).ok());
            Some(Header { name: u32_at(header, 0)? as usize, offset: field(0x18)?, size: field(0x20)? })
        });
        Some(Self { bytes, headers: headers.collect::<Option<Vec<_>>>()?, names })
    }

    fn section(&self, name: &str) -> Option<&'a [u8]> {
        let strings = self.content(self.headers.get(self.names)?)?;
        let named = |header: &&Header| {
            strings
                .get(header.name..)
                .and_then(|text| text.strip_prefix(name.as_bytes()))
                .is_some_and(|rest| rest.first() == Some(&0))
        };
        self.content(self.headers.iter().find(named)?)
    }

    fn content(&self, header: &Header) -> Option<&'a [u8]> {
        self.bytes.get(header.offset..header.offset.checked_add(header.size)?)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
ptxas         .     568 bytes stack frame, 920 bytes spill stores, 924 bytes spill loads
ptxas info    : Used 128 registers, used 0 barriers, 568 bytes cumulative stack size, 64 bytes smem
ptxas info    : Compile time = 208.241 ms
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 368 bytes cmem[0]
";

    #[test]
    fn reports_of_the_assembler_are_read() {
        let found = resources(LOG);
        let resources = |entry: &str, registers, stack_bytes, stores, loads, shared| Resources {
            entry: entry.to_owned(),
            registers,
            stack_bytes,
            spill_store_bytes: stores,
            spill_load_bytes: loads,
            static_shared_bytes: shared,
        };
        assert_eq!(found, [resources("k", 128, 568, 920, 924, 64), resources("other", 32, 0, 0, 0, 0)]);
        assert_eq!(super::resources("nothing of the sort\n"), []);
    }

    /// An ELF file with the section `name` of `content`, as small as can be.
    pub(crate) fn elf(name: &str, content: &[u8]) -> Vec<u8> {
        let strings = [b"\0", name.as_bytes(), b"\0"].concat();
        let (names_at, content_at) = (64, 64 + strings.len());
        let table = content_at + content.len();
        let mut file = b"\x7fELF\x02\x01".to_vec();
        file.resize(64, 0);
        file[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
        file[0x3c..0x3e].copy_from_slice(&2_u16.to_le_bytes());
        file.extend(strings.iter().chain(content));
        for (name, offset, size) in [(0_u32, names_at, strings.len()), (1, content_at, content.len())] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            file.extend(header);
        }
        file
    }

    /// Attributes as the assembler writes them, from a kernel with an argument of 16 bytes.
    const INFO: &[u8] = &[
        4, 0x37, 4, 0, 0x82, 0, 0, 0, 1, 0x35, 0, 0, 4, 0x0a, 8, 0, 4, 0, 0, 0, 0x60, 1, 16, 0, 3, 0x19, 16,
        0,
    ];

    #[test]
    fn the_size_of_the_argument_is_read() {
        assert_eq!(argument_bytes(&elf(".nv.info.k", INFO), "k").unwrap(), 16);
        let told = argument_bytes(&elf(".nv.info.kernel", INFO), "k").unwrap_err().to_string();
        assert!(told.contains("`k` is not in the code"), "{told}");
    }

    #[test]
    fn damaged_code_is_refused_wherever_it_is_damaged() {
        let whole = elf(".nv.info.k", INFO);
        for end in 0..whole.len() {
            assert!(argument_bytes(&whole[..end], "k").is_err(), "cut at {end}");
        }
        for at in 0..whole.len() {
            for value in [0, 0x7f, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] = value;
                // Any answer will do, as long as there is one.
                let _ = argument_bytes(&damaged, "k");
            }
        }
    }
}
