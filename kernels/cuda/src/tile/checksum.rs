//! CRC-32C of tiles on the device: the checksum that they travel with.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use crate::{Buffer, Device, Error, Kernel, Launch, Source, Span};

const SOURCE: Source =
    Source { name: "tile_checksum.cu", text: include_str!("../../source/tile_checksum.cu") };
const THREADS: u32 = 256;
/// Bytes of a vector.
const VECTOR: u64 = 16;
/// The polynomial, reflected: bit 31 is x^0.
const POLYNOMIAL: u32 = 0x82f6_3b78;
const ONE: u32 = 1 << 31;
/// Words of the tables that steps are made by.
const TABLES: usize = 8 * 256;

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tiles: u64,
    checksums: u64,
    tables: u64,
    bytes: u64,
}

pub(super) fn kernel() -> Kernel {
    Kernel { source: SOURCE, entry: "checksum_tiles", constants: Vec::new() }
}

/// Makes checksums of tiles and pages of one size.
#[derive(Debug)]
pub struct Checksums {
    device: Arc<dyn Device>,
    kernel: Kernel,
    tables: Buffer,
    bytes: u64,
}

impl Checksums {
    /// Of tiles of `bytes` bytes, a multiple of 16 above 0.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, Error> {
        if bytes == 0 || !(bytes as u64).is_multiple_of(VECTOR) {
            let problem = format!("is {bytes}, must be a multiple of 16 above 0");
            return Err(Error::Invalid { field: "bytes", problem });
        }
        let kernel = kernel();
        let tables = Buffer::from_slice(device, &tables())?;
        Ok(Self { device: Arc::clone(device), kernel, tables, bytes: bytes as u64 })
    }

    /// Queues the checksums of `count` tiles: `tiles` is a table of their u64 addresses, 16-byte aligned; `checksums` has room for as many u32.
    pub fn launch(&self, tiles: Span<'_>, checksums: Span<'_>, count: usize) -> Result<(), Error> {
        if count == 0 {
            return Ok(());
        }
        let params = Params {
            tiles: tiles.for_kernel("tiles", &[count], size_of::<u64>())?,
            checksums: checksums.for_kernel("checksums", &[count], size_of::<u32>())?,
            tables: self.tables.address(),
            bytes: self.bytes,
        };
        let launch = Launch::new(&self.kernel, [count as u32, 1, 1], THREADS, &params);
        self.device.launch(&launch.shared((TABLES * size_of::<u32>()) as u32))
    }
}

/// Steps of four bytes (for each byte of the four), the same and on past what the other threads take, and the place of each thread.
fn tables() -> Vec<u32> {
    let mut tables = vec![0; 256];
    for (byte, crc) in tables.iter_mut().enumerate() {
        *crc = (0..8).fold(byte as u32, |crc, _| times_x(crc));
    }
    for index in 256..1024 {
        let crc: u32 = tables[index - 256];
        let next = crc >> 8 ^ tables[(crc & 0xff) as usize];
        tables.push(next);
    }
    let others = power(times_x(ONE), 8 * VECTOR * u64::from(THREADS - 1));
    tables.extend_from_within(..);
    tables[1024..].iter_mut().for_each(|crc| *crc = multiply(*crc, others));
    // The inverse of x: x times it is 1.
    let back = power((ONE ^ POLYNOMIAL) << 1 | 1, 8 * VECTOR);
    let mut place = ONE;
    for _ in 0..THREADS {
        tables.push(place);
        place = multiply(place, back);
    }
    tables
}

fn times_x(a: u32) -> u32 {
    if a & 1 == 1 { a >> 1 ^ POLYNOMIAL } else { a >> 1 }
}

/// Product modulo the polynomial.
fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    for bit in (0..32).rev() {
        if a >> bit & 1 == 1 {
            product ^= b;
        }
        b = times_x(b);
    }
    product
}

fn power(mut base: u32, mut exponent: u64) -> u32 {
    let mut product = ONE;
    while exponent > 0 {
        if exponent & 1 == 1 {
            product = multiply(product, base);
        }
        base = multiply(base, base);
        exponent >>= 1;
    }
    product
}

#[cfg(test)]
mod tests {
    use super::{ONE, POLYNOMIAL, multiply, power, tables, times_x};

    #[test]
    fn steps_make_the_published_checksum() {
        let tables = tables();
        let mut crc = !0_u32;
        for word in b"12345678".chunks(4) {
            let word = crc ^ u32::from_le_bytes(word.try_into().unwrap());
            crc = (0..4)
                .fold(0, |crc, byte| crc ^ tables[768 - 256 * byte + (word >> (8 * byte) & 0xff) as usize]);
        }
        crc = crc >> 8 ^ tables[((crc ^ u32::from(b'9')) & 0xff) as usize];
        assert_eq!(!crc, 0xe306_9283);
    }

    #[test]
    fn x_has_an_inverse() {
        let back = (ONE ^ POLYNOMIAL) << 1 | 1;
        assert_eq!(multiply(times_x(ONE), back), ONE);
        assert_eq!(multiply(power(times_x(ONE), 1000), power(back, 1000)), ONE);
    }
}
