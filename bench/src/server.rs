//! The server that is measured where no other is named: weights in memory, and a question that reads them.
//!
//! It stands for a model server at its plainest: a start that reads a file of weights into private memory, and answers
//! that touch all of it (a dense model) or a part (a sparse one). No library is loaded and nothing is computed but a sum,
//! so what is measured is the bytes.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;

/// Weights are touched in pieces of this length: a layer's row, an expert's slice.
const BLOCK_BYTES: usize = 256 << 10;
const PAGE_BYTES: usize = 4096;
/// More header lines than a sane client sends.
const HEADER_LINES_MAX: usize = 100;

/// Serves `GET /healthz` and `GET /answer` on `127.0.0.1:port` until it is killed. `touch` is the part of the weights
/// that an answer reads, above 0 and at most 1.
///
/// # Errors
/// The weights cannot be read, or the port is in use.
pub fn serve(port: u16, weights: &Path, touch: f64) -> io::Result<()> {
    let mut memory = Vec::new();
    let mut file = File::open(weights)?;
    memory.reserve_exact(usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?);
    file.read_to_end(&mut memory)?;
    drop(file);
    let memory = Arc::new(memory);
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    for connection in listener.incoming() {
        let (Ok(connection), memory) = (connection, memory.clone()) else { continue };
        // A client that goes away is no reason to end.
        std::thread::spawn(move || drop(converse(connection, &memory, touch)));
    }
    Ok(())
}

fn converse(connection: TcpStream, memory: &[u8], touch: f64) -> io::Result<()> {
    let mut reader = BufReader::new(connection.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    for _ in 0..HEADER_LINES_MAX {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim_end().is_empty() {
            break;
        }
    }
    let (status, body) = match first.split_whitespace().nth(1) {
        Some("/healthz") => ("200 OK", "{}".to_owned()),
        Some("/answer") => ("200 OK", format!("{{\"sum\":\"{:016x}\"}}", sum(memory, touch))),
        _ => ("404 Not Found", "{}".to_owned()),
    };
    let mut connection = connection;
    write!(
        connection,
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// Adds up the words of each page of the touched blocks, which lie evenly over all weights, and mixes the sums in order: a
/// page that is wrong or in another's place changes the result.
fn sum(memory: &[u8], touch: f64) -> u64 {
    let every = (1.0 / touch).round().max(1.0) as usize;
    let blocks = memory.chunks(BLOCK_BYTES).step_by(every);
    blocks.flat_map(|block| block.chunks(PAGE_BYTES)).fold(0, |mixed: u64, page| {
        let words =
            page.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
        mixed.rotate_left(7).wrapping_add(words.fold(0, u64::wrapping_add))
    })
}

/// Writes `bytes` of bf16 weights to a new file, normally distributed around 0 with deviation 0.02, from a fixed seed.
///
/// # Errors
/// Of the file.
pub fn make_weights(path: &Path, bytes: u64) -> io::Result<()> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    // Drawing each of 10^9 values takes minutes; drawing from 65,536 draws takes seconds and has the same distribution.
    let draws: Vec<u16> = (0..=u16::MAX).map(|_| bf16(random.normal() * 0.02)).collect();
    let mut file = BufWriter::with_capacity(1 << 20, File::create_new(path)?);
    let mut left = bytes;
    while left > 0 {
        let word = random.next();
        let mut values = [0; 8];
        for (index, value) in values.chunks_exact_mut(2).enumerate() {
            value.copy_from_slice(&draws[(word >> (16 * index)) as usize & 0xffff].to_le_bytes());
        }
        let length = left.min(8);
        file.write_all(&values[..length as usize])?;
        left -= length;
    }
    file.flush()
}

/// The upper half of an IEEE single is a bf16.
fn bf16(value: f64) -> u16 {
    ((value as f32).to_bits() >> 16) as u16
}

/// xorshift64* by Vigna: fast, and good enough for weights that nothing learns from.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Normal by the sum of twelve uniforms.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| (self.next() >> 11) as f64 / (1u64 << 53) as f64).sum::<f64>() - 6.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_have_the_length_and_the_distribution_that_was_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        make_weights(&path, (1 << 20) + 3).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), (1 << 20) + 3);
        let values: Vec<f64> = bytes
            .chunks_exact(2)
            .map(|value| f64::from(f32::from_bits(u32::from(u16::from_le_bytes([value[0], value[1]])) << 16)))
            .collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.001, "{mean}");
        assert!((variance.sqrt() - 0.02).abs() < 0.001, "{variance}");
    }

    #[test]
    fn every_touched_byte_counts_and_no_other() {
        let mut memory = vec![0u8; 20 * BLOCK_BYTES];
        let before = sum(&memory, 0.1);
        memory[BLOCK_BYTES + 9] = 1;
        assert_eq!(sum(&memory, 0.1), before, "block 1 of ten is not touched");
        assert_ne!(sum(&memory, 1.0), before);
        memory[10 * BLOCK_BYTES + 15] = 1;
        let changed = sum(&memory, 0.1);
        assert_ne!(changed, before, "block 10 is");
        memory.swap(10 * BLOCK_BYTES + 15, 10 * BLOCK_BYTES + PAGE_BYTES + 15);
        assert_ne!(sum(&memory, 0.1), changed, "a page in another's place is seen");
    }
}
