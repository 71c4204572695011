//! One stretch of guest memory: pointer, length, and the operations that are sound on memory which others write meanwhile.
//!
//! Rule: no reference to guest memory, ever. Loads that must happen are volatile; copies go through raw pointers between guest
//! memory and private memory, so that what is worked on is private. If the guest writes during a copy, the copy holds some
//! mixture of old and new bytes: callers treat what they read as untrusted bytes, never as a value that was stored.
//!
//! Strictly, Rust calls it a data race when a copy meets a write that is not synchronised with it. Against a guest's processors
//! and devices nothing stricter can be had at the speed of memory; what is relied on is that a copy of bytes between two raw
//! addresses copies bytes, whatever they are, which is also what rust-vmm's `vm-memory` relies on.

use std::fmt;
use std::marker::PhantomData;
use std::ptr::{self, NonNull};

use super::{GuestMemory, SpanError, zero};

/// Part of a region of guest memory.
#[derive(Clone, Copy)]
pub struct Span<'m> {
    ptr: NonNull<u8>,
    len: usize,
    memory: PhantomData<&'m GuestMemory>,
}

// SAFETY: a span is an address and a length in a mapping that lives for 'm. All its operations are made for memory that
// others, the guest before all, write at the same time; it makes no difference on which thread they run.
unsafe impl Send for Span<'_> {}
// SAFETY: as above; a shared span can do nothing that a copy of it cannot.
unsafe impl Sync for Span<'_> {}

impl<'m> Span<'m> {
    /// # Safety
    /// For all of 'm, `base..base + start + len` must lie in one mapping that satisfies the contract of
    /// [`GuestMemory::from_raw`].
    pub(super) unsafe fn from_region(base: NonNull<u8>, start: usize, len: usize) -> Self {
        // SAFETY: inside the mapping, or one past its end if len is 0, by this function's contract.
        let ptr = unsafe { base.add(start) };
        Self {
            ptr,
            len,
            memory: PhantomData,
        }
    }

    /// Size in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address in this process, for the kernel and for devices. It must not be dereferenced by references.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// The bytes `offset..offset + len` of this span.
    ///
    /// # Errors
    /// [`SpanError::OutsideSpan`].
    pub fn subspan(&self, offset: usize, len: usize) -> Result<Self, SpanError> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(SpanError::OutsideSpan {
                offset,
                bytes: len,
                span_bytes: self.len,
            });
        }
        // SAFETY: offset + len ≤ self.len was just checked, and self lies in its mapping.
        Ok(unsafe { Self::from_region(self.ptr, offset, len) })
    }

    /// Copies the span into private memory.
    ///
    /// # Panics
    /// If `to` is not exactly as long as the span.
    pub fn copy_to(&self, to: &mut [u8]) {
        assert_eq!(
            to.len(),
            self.len,
            "copy_to needs a buffer of the span's length"
        );
        // SAFETY: the span's bytes are mapped and readable; `to` is writable for the same length; a Rust slice cannot overlap
        // guest memory (`from_raw`'s contract).
        unsafe { ptr::copy_nonoverlapping(self.ptr.as_ptr(), to.as_mut_ptr(), self.len) };
    }

    /// Copies private memory into the span.
    ///
    /// # Panics
    /// If `from` is not exactly as long as the span.
    pub fn copy_from(&self, from: &[u8]) {
        assert_eq!(
            from.len(),
            self.len,
            "copy_from needs a buffer of the span's length"
        );
        // SAFETY: the span's bytes are mapped and writable, `from` is readable for the same length and cannot overlap guest
        // memory (`from_raw`'s contract).
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.ptr.as_ptr(), self.len) };
    }

    /// Copies another span into this one. They may belong to different memories.
    ///
    /// # Panics
    /// If they are not of one length.
    pub fn copy_from_span(&self, from: Span<'_>) {
        assert_eq!(
            from.len, self.len,
            "copy_from_span needs spans of one length"
        );
        // SAFETY: both spans' bytes are mapped, readable and writable; `copy` allows them to overlap.
        unsafe { ptr::copy(from.ptr.as_ptr(), self.ptr.as_ptr(), self.len) };
    }

    /// Writes zero to every byte. Backs the memory with pages; fresh memory is better left alone.
    pub fn fill_zero(&self) {
        // SAFETY: the span's bytes are mapped and writable.
        unsafe { ptr::write_bytes(self.ptr.as_ptr(), 0, self.len) };
    }

    /// Whether every byte is zero. Stops soon after the first that is not.
    ///
    /// Never reads outside the span. A byte that is written meanwhile may be seen before or after the write.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        // SAFETY: the span's bytes are mapped and readable.
        unsafe { zero::is_zero(self.ptr.as_ptr(), self.len) }
    }
}

impl fmt::Debug for Span<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Span({:p}, {} bytes)", self.ptr, self.len)
    }
}
