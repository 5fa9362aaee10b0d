//! Points of other programs, as `tests/perf/cuda_peers.py` writes them, beside ours.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::Point;

/// What is measured of other programs too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Beside {
    /// All pairs of a prompt.
    DensePrefill,
    /// A part of them, at a density of its own.
    SparsePrefill,
    /// One decode step.
    Decode,
}

/// The file.
#[derive(Debug, Deserialize)]
struct File {
    device: String,
    torch: String,
    points: Vec<Measured>,
}

/// A point of the file.
#[derive(Debug, Clone, Deserialize, Serialize)]
struct Measured {
    what: String,
    /// `prefill N`, `prefill N, …` or `decode N`.
    shape: String,
    seconds: f64,
    tflops: f64,
    gbps: f64,
}

/// Points of other programs.
#[derive(Debug, Serialize)]
pub(in super::super) struct Peers {
    device: String,
    torch: String,
    points: Vec<Compared>,
}

#[derive(Debug, Serialize)]
struct Compared {
    #[serde(flatten)]
    measured: Measured,
    /// Our rate over theirs, where we have a point like it.
    ours: Option<f64>,
}

impl Peers {
    /// Reads a file, and compares `points` with it. Refuses figures of another GPU.
    pub(in super::super) fn read(path: &Path, device: &str, points: &[Point]) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("`--peers`: cannot read `{}`", path.display()))?;
        let hint = "hint: write it with `tests/perf/cuda_peers.py --json`";
        let file: File = serde_json::from_str(&text)
            .with_context(|| format!("`--peers`: `{}` is no such report; {hint}", path.display()))?;
        ensure!(
            file.device == device,
            "`--peers`: `{}` was measured on `{}`, this is `{device}`; {hint} on this GPU",
            path.display(),
            file.device
        );
        let compared = |measured: Measured| Compared { ours: ours(&measured, points), measured };
        Ok(Self {
            device: file.device,
            torch: file.torch,
            points: file.points.into_iter().map(compared).collect(),
        })
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let line = |point: &Compared| {
            let Measured { what, shape, seconds, tflops, gbps } = &point.measured;
            let rate = if *tflops > 0.0 { format!("{tflops:.1} TFLOP/s") } else { format!("{gbps:.1} GB/s") };
            let ours = point.ours.map_or_else(String::new, |ours| format!("{ours:.2}"));
            format!("| {what} | {shape} | {:.3} | {rate} | {ours} |\n", seconds * 1e3)
        };
        format!(
            "\n| other programs (PyTorch {}) | shape | ms | rate | our rate over theirs |\n| --- | --- | --- | --- | --- |\n{}",
            self.torch,
            self.points.iter().map(line).collect::<String>()
        )
    }
}

fn ours(measured: &Measured, points: &[Point]) -> Option<f64> {
    let (shape, tokens) = measured.shape.split(',').next()?.split_once(' ')?;
    let tokens: usize = tokens.parse().ok()?;
    let kind = match (shape, measured.shape.contains(',')) {
        ("prefill", false) => Beside::DensePrefill,
        ("prefill", true) => Beside::SparsePrefill,
        ("decode", _) => Beside::Decode,
        _ => return None,
    };
    let point = points.iter().find(|point| point.beside == Some((kind, tokens)))?;
    let ratio = match (point.tflops, point.gbps) {
        (Some(tflops), _) => tflops / measured.tflops,
        (None, Some(gbps)) => gbps / measured.gbps,
        (None, None) => return None,
    };
    ratio.is_finite().then_some(ratio)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::statistics::Spread;

    #[test]
    fn points_of_the_same_shape_are_compared() {
        let one = |seconds| Spread::of(vec![seconds]);
        let points = [
            Point::flops("dense".to_owned(), one(2.0), 4e14, &one(800.0)).beside(Beside::DensePrefill, 64),
            Point::flops("lists".to_owned(), one(1.0), 3e14, &one(800.0)).beside(Beside::SparsePrefill, 64),
            Point::bytes("decode".to_owned(), one(1.0), 3e12, &one(4000.0)).beside(Beside::Decode, 64),
        ];
        let point = |what: &str, shape: &str, tflops: f64, gbps: f64| serde_json::json!({"what": what, "shape": shape, "seconds": 1.0, "tflops": tflops, "gbps": gbps});
        let all = [
            point("torch.matmul", "8192^3 bf16", 790.0, 0.0),
            point("flash_attn", "prefill 64", 250.0, 0.0),
            point("flash_attn", "prefill 128", 250.0, 0.0),
            point("minference block_sparse", "prefill 64, 3 blocks a row", 100.0, 0.0),
            point("flash_attn_with_kvcache", "decode 64", 0.0, 4000.0),
        ];
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("peers.json");
        let file = serde_json::json!({"device": "GPU", "torch": "2", "density": 0.06, "points": all});
        std::fs::write(&path, file.to_string()).unwrap();
        let peers = Peers::read(&path, "GPU", &points).unwrap();
        let ours: Vec<Option<f64>> = peers.points.iter().map(|point| point.ours).collect();
        assert_eq!(ours, [None, Some(0.8), None, Some(3.0), Some(0.75)]);
        assert!(
            peers.table().contains("| flash_attn | prefill 64 | 1000.000 | 250.0 TFLOP/s | 0.80 |"),
            "{}",
            peers.table()
        );
        let refused = |path: &Path| Peers::read(path, "another", &points).unwrap_err().to_string();
        assert!(refused(&path).contains("was measured on `GPU`"), "{}", refused(&path));
        assert!(refused(&folder.path().join("none")).contains("`--peers`: cannot read"));
        std::fs::write(&path, "{}").unwrap();
        assert!(refused(&path).contains("no such report"), "{}", refused(&path));
    }
}
