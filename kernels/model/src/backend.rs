//! The forward pass, cut at attention: whoever calls it brings attention from wherever the KV lies.

use std::any::Any;
use std::borrow::Cow;
use std::sync::Arc;

use crate::logits::whole_rows;
use crate::{Error, ModelConfig, RowLogits, WantedRow};

/// Rows of f32 that a device keeps. Nobody changes them while they are shared.
pub trait DeviceRows: Any + Send + Sync + std::fmt::Debug {
    /// The chosen rows, in the order of `rows`, which all exist.
    fn select(&self, rows: &[usize]) -> Result<Arc<dyn DeviceRows>, Error>;
    /// Waits for them and copies them, row-major.
    fn read(&self) -> Result<Vec<f32>, Error>;
    /// Begins to copy them, behind what was queued before and beside what is queued later. They stay as they are until the read is over.
    fn begin_read(self: Arc<Self>) -> Result<Box<dyn DeviceRead>, Error>;
}

/// Rows of a device that are on their way to the host. Dropped, they do not come.
pub trait DeviceRead: Send + std::fmt::Debug {
    /// Waits for them, and with them for all whose reads were begun before; row-major.
    fn finish(self: Box<Self>) -> Result<Vec<f32>, Error>;
}

/// A read that was begun ([`Activations::begin_read`]).
#[derive(Debug)]
pub enum RowsRead {
    /// Rows that were in host memory.
    Here(Vec<f32>),
    /// Rows that a device sends.
    Coming(Box<dyn DeviceRead>),
}

impl RowsRead {
    /// The elements, row-major. Waits for rows that are still on their way.
    pub fn finish(self) -> Result<Vec<f32>, Error> {
        match self {
            Self::Here(data) => Ok(data),
            Self::Coming(read) => read.finish(),
        }
    }

    /// Both, with one wait: `later` was begun behind `earlier`.
    pub fn finish_both(earlier: Self, later: Self) -> Result<(Vec<f32>, Vec<f32>), Error> {
        let later = later.finish()?;
        Ok((earlier.finish()?, later))
    }
}

/// Rows of f32, such as the residual stream. Opaque, so that a device may keep them ([`Activations::on_device`]); those of a CPU backend
/// are in host memory.
#[derive(Debug, Clone)]
pub struct Activations {
    rows: usize,
    width: usize,
    place: Place,
}

#[derive(Debug, Clone)]
enum Place {
    Host(Vec<f32>),
    Device(Arc<dyn DeviceRows>),
}

impl PartialEq for Activations {
    /// Rows on a device are equal to themselves alone: comparing them would have to wait for the device.
    fn eq(&self, other: &Self) -> bool {
        (self.rows, self.width) == (other.rows, other.width)
            && match (&self.place, &other.place) {
                (Place::Host(a), Place::Host(b)) => a == b,
                (Place::Device(a), Place::Device(b)) => Arc::ptr_eq(a, b),
                _ => false,
            }
    }
}

impl Activations {
    /// Rows in host memory, f32 `[rows, width]`.
    pub fn from_host(width: usize, data: Vec<f32>) -> Self {
        debug_assert!(width > 0 && data.len().is_multiple_of(width));
        Self { rows: data.len() / width, width, place: Place::Host(data) }
    }

    /// Rows on a device.
    pub fn from_device(rows: usize, width: usize, kept: Arc<dyn DeviceRows>) -> Self {
        Self { rows, width, place: Place::Device(kept) }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The chosen rows, in the order of `rows`; each must exist. Only a device can fail.
    pub fn select(&self, rows: &[usize]) -> Result<Self, Error> {
        assert!(rows.iter().all(|row| *row < self.rows), "every chosen row exists");
        let place = match &self.place {
            Place::Host(data) => {
                let chosen = rows.iter().flat_map(|row| &data[row * self.width..][..self.width]);
                Place::Host(chosen.copied().collect())
            }
            Place::Device(kept) => Place::Device(kept.select(rows)?),
        };
        Ok(Self { rows: rows.len(), width: self.width, place })
    }

    /// Elements, row-major, of rows in host memory.
    ///
    /// # Panics
    /// When a device keeps them: ask [`Self::to_host`].
    pub fn host(&self) -> &[f32] {
        match &self.place {
            Place::Host(data) => data,
            Place::Device(_) => panic!("rows of a device are read with `to_host`"),
        }
    }

    /// Elements, row-major, of rows in host memory.
    ///
    /// # Panics
    /// When a device keeps them.
    pub fn host_mut(&mut self) -> &mut [f32] {
        match &mut self.place {
            Place::Host(data) => data,
            Place::Device(_) => panic!("rows of a device are changed by its backend"),
        }
    }

    /// Elements, row-major, wherever they are. Waits for a device that keeps them, so not for every layer.
    pub fn to_host(&self) -> Result<Cow<'_, [f32]>, Error> {
        Ok(match &self.place {
            Place::Host(data) => Cow::Borrowed(data),
            Place::Device(kept) => Cow::Owned(kept.read()?),
        })
    }

    /// Begins to bring the elements to the host: nobody waits before the read is finished, and other work may be queued meanwhile. Rows in host
    /// memory are there, without a copy.
    pub fn begin_read(self) -> Result<RowsRead, Error> {
        Ok(match self.place {
            Place::Host(data) => RowsRead::Here(data),
            Place::Device(kept) => RowsRead::Coming(kept.begin_read()?),
        })
    }

    /// What the device keeps; `None` for rows in host memory.
    pub fn on_device(&self) -> Option<&Arc<dyn DeviceRows>> {
        match &self.place {
            Place::Host(_) => None,
            Place::Device(kept) => Some(kept),
        }
    }
}

/// Queries, keys and values of some rows in one layer; q and k are rotated.
#[derive(Debug, Clone, PartialEq)]
pub struct Qkv {
    /// f32 `[rows, query_heads, head_dim]`.
    pub q: Vec<f32>,
    /// f32 `[rows, kv_heads, head_dim]`.
    pub k: Vec<f32>,
    /// f32 `[rows, kv_heads, head_dim]`.
    pub v: Vec<f32>,
}

/// [`Qkv`] where the backend keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct KeptQkv {
    /// f32 `[rows, query_heads * head_dim]`.
    pub q: Activations,
    /// f32 `[rows, kv_heads * head_dim]`.
    pub k: Activations,
    /// f32 `[rows, kv_heads * head_dim]`.
    pub v: Activations,
}

/// A model on a device. A row's result never depends on which other rows are in the call, bit for bit (but where a backend was told to
/// give that up).
pub trait Backend: Send + Sync + std::fmt::Debug {
    /// What the model says of itself.
    fn config(&self) -> &ModelConfig;
    /// Bytes of its weights as they lie in memory.
    fn memory_bytes(&self) -> u64;
    /// Looks tokens up; refuses ids outside the vocabulary.
    fn embed(&self, tokens: &[u32]) -> Result<Activations, Error>;
    /// Norm, projections, biases, q/k norms, rotation at absolute `positions` (one per row).
    fn qkv(&self, layer: usize, x: &Activations, positions: &[u64]) -> Result<Qkv, Error>;
    /// Output projection of `attention` (f32 `[rows, query_heads * head_dim]`), residual, feed-forward, residual.
    fn finish(&self, layer: usize, x: Activations, attention: &[f32]) -> Result<Activations, Error>;
    /// Final norm and output matrix for the chosen rows: f32 `[rows.len(), vocabulary]`.
    fn logits(&self, x: &Activations, rows: &[usize]) -> Result<Vec<f32>, Error>;

    /// Final norm and output matrix for the wanted rows, one product for all of them. A backend that can choose where it computes gives of
    /// a row no more than its likeliest tokens where these are enough, so that 128K logits need not travel for each token. A row may
    /// always come whole, and one with a logit that is not finite does: who chooses then tells of it. Which token wins among equal logits
    /// depends on neither: the one with the lowest id.
    fn candidates(&self, x: &Activations, wanted: &[WantedRow]) -> Result<Vec<RowLogits>, Error> {
        whole_rows(self, x, wanted)
    }

    /// [`Self::qkv`], with rows that stay where the backend computes: with an executor that takes them there, no layer waits for the
    /// device.
    fn qkv_kept(&self, layer: usize, x: &Activations, positions: &[u64]) -> Result<KeptQkv, Error> {
        let Qkv { q, k, v } = self.qkv(layer, x, positions)?;
        let heads = self.config().heads;
        let kv_width = heads.kv_heads * heads.head_dim;
        Ok(KeptQkv {
            q: Activations::from_host(kv_width * heads.group, q),
            k: Activations::from_host(kv_width, k),
            v: Activations::from_host(kv_width, v),
        })
    }

    /// [`Self::finish`] with attention that lies where the backend computes.
    fn finish_kept(
        &self,
        layer: usize,
        x: Activations,
        attention: &Activations,
    ) -> Result<Activations, Error> {
        self.finish(layer, x, &attention.to_host()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows that a device might keep.
    #[derive(Debug)]
    struct Kept(Vec<f32>);

    impl DeviceRows for Kept {
        fn select(&self, rows: &[usize]) -> Result<Arc<dyn DeviceRows>, Error> {
            Ok(Arc::new(Self(rows.iter().flat_map(|row| [self.0[row * 2], self.0[row * 2 + 1]]).collect())))
        }

        fn read(&self) -> Result<Vec<f32>, Error> {
            Ok(self.0.clone())
        }

        fn begin_read(self: Arc<Self>) -> Result<Box<dyn DeviceRead>, Error> {
            Ok(Box::new(Coming(self)))
        }
    }

    #[derive(Debug)]
    struct Coming(Arc<Kept>);

    impl DeviceRead for Coming {
        fn finish(self: Box<Self>) -> Result<Vec<f32>, Error> {
            self.0.read()
        }
    }

    #[test]
    fn reads_are_finished_later_and_rows_of_the_host_are_not_copied() {
        let data = vec![1.0, 2.0, 3.0, 4.0];
        let at = data.as_ptr();
        let host = Activations::from_host(2, data.clone()).begin_read().unwrap();
        let device = Activations::from_device(2, 2, Arc::new(Kept(data.clone()))).begin_read().unwrap();
        let (host, device) = RowsRead::finish_both(host, device).unwrap();
        assert!(host == data && device == data);
        let moved = Activations::from_host(2, data).begin_read().unwrap().finish().unwrap();
        assert_eq!(moved.as_ptr(), at, "moved, not copied");
    }

    #[test]
    fn rows_are_chosen_and_read_wherever_they_are() {
        let data = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let host = Activations::from_host(2, data.clone());
        let device = Activations::from_device(3, 2, Arc::new(Kept(data)));
        for rows in [&host, &device] {
            let chosen = rows.select(&[2, 0, 2]).unwrap();
            assert_eq!((chosen.rows(), chosen.width()), (3, 2));
            assert_eq!(*chosen.to_host().unwrap(), [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]);
        }
        assert!(host.on_device().is_none() && device.on_device().is_some());
        assert!(device == device.clone() && host == host.clone() && host != device);
        assert!(device != device.select(&[0, 1, 2]).unwrap(), "a copy is not the same rows");
    }

    #[test]
    #[should_panic(expected = "`to_host`")]
    fn rows_of_a_device_are_no_slice() {
        Activations::from_device(1, 2, Arc::new(Kept(vec![1.0, 2.0]))).host();
    }

    #[test]
    #[should_panic(expected = "every chosen row exists")]
    fn rows_that_do_not_exist_are_not_chosen() {
        drop(Activations::from_host(2, vec![1.0, 2.0]).select(&[1]));
    }
}
