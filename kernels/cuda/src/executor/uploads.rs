//! Query rows that several items of a call share: they go up once.

use std::rc::Rc;
use std::sync::Arc;

use crate::{Buffer, Device, Error};

/// The queries that went up last.
#[derive(Debug)]
pub(super) struct QueryRows<'a> {
    device: &'a Arc<dyn Device>,
    last: Option<(&'a [f32], Rc<Buffer>)>,
}

impl<'a> QueryRows<'a> {
    pub(super) fn new(device: &'a Arc<dyn Device>) -> Self {
        Self { device, last: None }
    }

    /// Rows on the device. The items of a call, which outlive this, borrow what they ask for: the same place holds the same rows.
    pub(super) fn of(&mut self, data: &'a [f32]) -> Result<Rc<Buffer>, Error> {
        match &self.last {
            Some((last, rows)) if std::ptr::eq(*last, data) => Ok(Rc::clone(rows)),
            _ => {
                let rows = Rc::new(Buffer::from_slice(self.device, data)?);
                self.last = Some((data, Rc::clone(&rows)));
                Ok(rows)
            }
        }
    }
}
