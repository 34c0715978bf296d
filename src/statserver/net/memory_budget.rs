//! Memory that all connections share.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// So much of a body, a frame or a response is not reserved: it is a part of what a connection
/// costs.
pub const FREE_BYTES: usize = 4 << 10;

/// A number of bytes of which connections reserve what they hold.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Semaphore>);

/// A part of a [`Budget`], which is returned to it on drop.
#[derive(Debug, Default)]
pub struct Reservation(Option<OwnedSemaphorePermit>);

/// Too little of a [`Budget`] is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exhausted;

impl Budget {
    /// A budget of so many bytes.
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes)))
    }

    /// Grows a reservation until it covers so many bytes, of which the first [`FREE_BYTES`] are
    /// free.
    ///
    /// # Errors
    /// [`Exhausted`]; the reservation stays as it was.
    pub fn reserve(&self, reservation: &mut Reservation, bytes: usize) -> Result<(), Exhausted> {
        let wanted = bytes.saturating_sub(FREE_BYTES);
        let more = wanted.saturating_sub(reservation.0.as_ref().map_or(0, OwnedSemaphorePermit::num_permits));
        if more == 0 {
            return Ok(());
        }
        let more = u32::try_from(more).map_err(|_| Exhausted)?;
        let permit = Arc::clone(&self.0).try_acquire_many_owned(more).map_err(|_| Exhausted)?;
        match &mut reservation.0 {
            Some(reserved) => reserved.merge(permit),
            None => reservation.0 = Some(permit),
        }
        Ok(())
    }

    /// Returns how many bytes are left.
    #[cfg(test)]
    pub fn available(&self) -> usize {
        self.0.available_permits()
    }
}
