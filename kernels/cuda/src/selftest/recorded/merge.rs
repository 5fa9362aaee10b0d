//! Merges of partials, some empty.

use std::sync::Arc;

use longshore_attention::Partials;

use super::Twin;
use super::file::Arrays;
use crate::selftest::decode::{merged_on_device, random_records};
use crate::selftest::executor::refused;
use crate::selftest::material::{Random, differing};
use crate::{Device, Error};

const HEAD_DIM: usize = 80;
const SOURCES: usize = 6;
const RECORDS: usize = 10;

pub(super) struct Merge;

impl Twin for Merge {
    fn inputs(&self) -> Result<Arrays, Error> {
        let mut random = Random(72);
        let all: Vec<f32> =
            (0..SOURCES).flat_map(|_| random_records(&mut random, HEAD_DIM, RECORDS)).collect();
        Ok(Arrays::default().with("partials", &all))
    }

    fn on_cpu(&self, inputs: &Arrays) -> Result<Arrays, Error> {
        let mut merged = Partials::identity(RECORDS, 1, HEAD_DIM);
        for records in inputs.get::<f32>("partials")?.chunks(RECORDS * (2 + HEAD_DIM)) {
            let later = Partials::from_interleaved(RECORDS, 1, HEAD_DIM, records).map_err(refused)?;
            merged.merge(&later).map_err(refused)?;
        }
        let whole = merged.to_interleaved();
        Ok(Arrays::default().with("merged", &whole).with("finished", &merged.finish()))
    }

    /// Words that differ.
    fn on_device(&self, device: &Arc<dyn Device>, inputs: &Arrays, results: &Arrays) -> Result<f64, Error> {
        let partials = inputs.get::<f32>("partials")?;
        let partials: Vec<Vec<f32>> =
            partials.chunks(RECORDS * (2 + HEAD_DIM)).map(<[f32]>::to_vec).collect();
        let (merged, finished) = merged_on_device(device, HEAD_DIM, &partials, RECORDS)?;
        let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
        let wrong = differing(&bits(&merged), &results.get("merged")?);
        Ok(wrong + differing(&bits(&finished), &results.get("finished")?))
    }

    fn limit(&self) -> f64 {
        0.0
    }
}
