//! Pages on their way from a kernel into the dirty set, as values that prove how far they came.
//!
//! ```text
//!   Collected  seen in a ring or bitmap; the kernel may not report the next write yet, so nothing may be read
//!      │ rearm(kernel_reset)
//!   Rearmed    the kernel was told; any later write is reported again
//!      │ DirtySet::merge
//!   in the set, from where a Round hands it out to be read
//! ```
//!
//! There is no other way from a [`Collected`] into the set, and no way to make a [`Rearmed`] but from one.

use crate::Run;
use crate::levels::WORD_BITS;

/// Up to 64 pages of one region: the ones of `bits`, counted from page `word * 64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bits {
    pub(crate) region: u32,
    pub(crate) word: u64,
    pub(crate) bits: u64,
}

/// Pages that a kernel reported as written. Their contents must not be read yet.
///
/// A page may be in it several times; the set will hold it once.
#[derive(Debug, Default)]
#[must_use = "the kernel will not report these pages again: dropping them loses guest data"]
pub struct Collected {
    words: Vec<Bits>,
    runs: Vec<Run>,
}

/// Pages that a kernel reported and of which it will report the next write.
///
/// ```compile_fail,E0423
/// // Only `Collected::rearm` makes one.
/// let proof = multifd_tracking::Rearmed(multifd_tracking::Collected::new());
/// ```
#[derive(Debug)]
#[must_use = "these pages are in no set yet: dropping them loses guest data"]
pub struct Rearmed {
    pages: Collected,
}

/// The kernel refused to re-arm. The pages are still here, and still must not be read.
#[derive(Debug, thiserror::Error)]
#[error("re-arming failed: {error}")]
#[must_use = "the pages inside were reported once and will not be again: dropping them loses guest data"]
pub struct RearmFailed<E: std::error::Error + 'static> {
    /// What was collected.
    pub collected: Collected,
    /// What the kernel answered.
    #[source]
    pub error: E,
}

impl Collected {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a page.
    pub fn push_page(&mut self, region: u32, page: u64) {
        self.push_bits(region, page / WORD_BITS, 1 << (page % WORD_BITS));
    }

    /// Adds the pages whose bits are set, counted from page `word * 64` of the region.
    pub fn push_bits(&mut self, region: u32, word: u64, bits: u64) {
        // Neighbours mostly come one after the other, and emulated stores report a page again and again.
        match self.words.last_mut() {
            Some(last) if last.region == region && last.word == word => last.bits |= bits,
            _ if bits != 0 => self.words.push(Bits { region, word, bits }),
            _ => {}
        }
    }

    /// Adds the pages of a run.
    pub fn push_run(&mut self, run: Run) {
        if run.count > 0 {
            self.runs.push(run);
        }
    }

    pub(crate) fn words(&self) -> &[Bits] {
        &self.words
    }

    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Adds everything that `other` holds.
    pub fn append(&mut self, mut other: Self) {
        self.words.append(&mut other.words);
        self.runs.append(&mut other.runs);
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty() && self.runs.is_empty()
    }

    /// The pages added; one that was added several times may be counted several times.
    pub fn pages(&self) -> u64 {
        let single: u64 = self
            .words
            .iter()
            .map(|found| u64::from(found.bits.count_ones()))
            .sum();
        single + self.runs.iter().map(|run| run.count).sum::<u64>()
    }

    /// Tells the kernel to report the next write to these pages, and turns them into what the set takes.
    ///
    /// `kernel_reset` must return `Ok` only when every write that happens afterwards to any of these pages will be
    /// reported. Whoever writes a source owes that; it cannot be checked here.
    ///
    /// # Errors
    /// What `kernel_reset` answered, together with the pages.
    pub fn rearm<E: std::error::Error + 'static>(
        self,
        kernel_reset: impl FnOnce() -> Result<(), E>,
    ) -> Result<Rearmed, RearmFailed<E>> {
        match kernel_reset() {
            Ok(()) => Ok(Rearmed { pages: self }),
            Err(error) => Err(RearmFailed {
                collected: self,
                error,
            }),
        }
    }

    /// For a kernel call that re-arms and reports in one step: what it reported is re-armed already.
    pub(crate) fn rearmed_by_fetch(self) -> Rearmed {
        Rearmed { pages: self }
    }
}

impl Rearmed {
    /// As [`Collected::pages`].
    pub fn pages(&self) -> u64 {
        self.pages.pages()
    }

    pub(crate) fn into_inner(self) -> Collected {
        self.pages
    }
}
