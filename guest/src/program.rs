//! What the virtual CPUs run: a dozen instructions of 64-bit code for each store.
//!
//! ```text
//!   top:     inc   rbx                  the next stamp
//!            mov   rax, rbx             ┐
//!            imul  rax, r8              │ random:     rdx = page_of(stamp)
//!            bswap rax                  │
//!            imul  rax, rax             │
//!            imul  rax, r13             │
//!            mul   r9                   ┘             (sequential: mov rax, rbx; clear edx; div r9)
//!            mov   [r11 + rdx*8], rbx   the log first …
//!            shl   rdx, 12
//!            mov   [r10 + rdx], rbx     … then the page
//!            loop  top                  rcx stores are left of the batch
//!            mov   [r14], rbx           the header
//!            mov   eax, ebx
//!            out   0xE0, eax            heart-beat: the low half of the counter
//!            mov   rcx, r12
//!            jmp   top
//!
//!   rbx counter = last stamp   rcx stores left    r8, r13 multipliers of the hash   r9 pages of the share
//!   r10 stamp word of page 0   r11 log            r12 stores of a batch             r14 counter in the header
//! ```
//!
//! An idle guest's program is `inc rbx; mov eax, ebx; out; jmp`: it reports and stores nothing.
//!
//! A virtual CPU can be stopped between any two instructions. Where it was stopped says exactly how far its last store
//! came ([`Progress`]), so that the check needs no tolerance. There is no stack, no interrupt and no data but through
//! the registers, and the program never changes: any exception ends the machine and is reported.

use crate::asm::{Assembler, Position, Reg};
use crate::config::{PAGE_BYTES, Pattern};
use crate::layout::{self, HEADER_COUNTER_WORD, Layout, PAGE_WORDS, PROGRAM_PAGE, PageWords};
use crate::workload::{MIX, Share};

/// The I/O port of the heart-beat.
pub(crate) const BEAT_PORT: u8 = 0xE0;

/// The program of a guest, and where in it things happen.
#[derive(Debug)]
pub(crate) struct Program {
    octets: Vec<u8>,
    marks: Option<Marks>,
}

/// Positions that tell how far a store came.
#[derive(Debug)]
struct Marks {
    /// The store to the log.
    log_store: Position,
    /// The store to the page.
    page_store: Position,
    /// The store to the header.
    header_store: Position,
}

/// The registers that a virtual CPU starts with; all others are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Registers {
    pub(crate) rip: u64,
    pub(crate) rcx: u64,
    pub(crate) r8: u64,
    pub(crate) r9: u64,
    pub(crate) r10: u64,
    pub(crate) r11: u64,
    pub(crate) r12: u64,
    pub(crate) r13: u64,
    pub(crate) r14: u64,
}

/// How far a virtual CPU came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// The last stamp that was begun.
    pub(crate) counter: u64,
    /// How far its store came.
    pub(crate) last_store: LastStore,
    /// What the header must hold.
    pub(crate) header: u64,
}

/// How far the store of the last stamp came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LastStore {
    /// Neither in the log nor in the page.
    Begun,
    /// In the log and not yet in the page.
    Logged,
    /// In both.
    Done,
}

impl Program {
    /// The program for a guest of this layout.
    pub(crate) fn new(layout: &Layout) -> Self {
        let idle = layout.shares.iter().all(|share| share.batch == 0);
        let mut code = Assembler::default();
        let marks = if idle {
            idle_loop(&mut code)
        } else {
            Some(store_loop(&mut code, layout.pattern))
        };
        Self {
            octets: code.into_octets(),
            marks,
        }
    }

    /// The page that holds the program.
    pub(crate) fn page_words(&self) -> PageWords {
        let mut words = [0; PAGE_WORDS];
        for (word, octets) in words.iter_mut().zip(self.octets.chunks(8)) {
            let mut padded = [0; 8];
            padded[..octets.len()].copy_from_slice(octets);
            *word = u64::from_le_bytes(padded);
        }
        words
    }

    /// What the virtual CPU of `share` starts with.
    pub(crate) fn registers(&self, layout: &Layout, share: &Share) -> Registers {
        let stamp_offset = layout::stamp_word(share.vcpu) as u64 * 8;
        Registers {
            rip: PROGRAM_PAGE * PAGE_BYTES,
            rcx: share.batch,
            r8: share.weyl,
            r9: share.pages,
            r10: share.first_page * PAGE_BYTES + stamp_offset,
            r11: share.log_page * PAGE_BYTES,
            r12: share.batch,
            r13: MIX,
            r14: layout.header_page(share.vcpu) * PAGE_BYTES + HEADER_COUNTER_WORD as u64 * 8,
        }
    }

    /// How far the virtual CPU of `share` came, from its instruction pointer and its counter (`rbx`).
    ///
    /// # Errors
    /// A sentence if the instruction pointer is outside the program.
    pub(crate) fn progress(
        &self,
        share: &Share,
        rip: u64,
        counter: u64,
    ) -> Result<Progress, String> {
        let start = PROGRAM_PAGE * PAGE_BYTES;
        let at = rip
            .checked_sub(start)
            .filter(|at| *at < self.octets.len() as u64);
        let Some(at) = at.map(|at| Position(at as usize)) else {
            return Err(format!(
                "vcpu{} is outside its program, at {rip:#x}",
                share.vcpu
            ));
        };
        let Some(marks) = &self.marks else {
            return Ok(Progress {
                counter,
                last_store: LastStore::Done,
                header: 0,
            });
        };
        // An instruction pointer on a store means that the store has not happened.
        let last_store = match at {
            Position(0) => LastStore::Done,
            at if at <= marks.log_store => LastStore::Begun,
            at if at <= marks.page_store => LastStore::Logged,
            _ => LastStore::Done,
        };
        let batch_start = counter - counter % share.batch;
        let header_is_behind =
            counter == batch_start && at > Position(0) && at <= marks.header_store;
        let header = if header_is_behind {
            counter.saturating_sub(share.batch)
        } else {
            batch_start
        };
        Ok(Progress {
            counter,
            last_store,
            header,
        })
    }
}

fn store_loop(code: &mut Assembler, pattern: Pattern) -> Marks {
    let top = code.here();
    code.inc(Reg::Rbx);
    code.mov(Reg::Rax, Reg::Rbx);
    match pattern {
        Pattern::Random => {
            code.imul(Reg::Rax, Reg::R8);
            code.bswap(Reg::Rax);
            code.imul(Reg::Rax, Reg::Rax);
            code.imul(Reg::Rax, Reg::R13);
            code.mul(Reg::R9);
        }
        Pattern::Sequential => {
            code.clear(Reg::Rdx);
            code.div(Reg::R9);
        }
    }
    let log_store = code.here();
    code.store_indexed(Reg::R11, Reg::Rdx, 3, Reg::Rbx);
    code.shl(Reg::Rdx, 12);
    let page_store = code.here();
    code.store_indexed(Reg::R10, Reg::Rdx, 0, Reg::Rbx);
    code.loop_to(top);
    let header_store = code.here();
    code.store(Reg::R14, Reg::Rbx);
    code.mov32(Reg::Rax, Reg::Rbx);
    code.out_eax(BEAT_PORT);
    code.mov(Reg::Rcx, Reg::R12);
    code.jmp(top);
    Marks {
        log_store,
        page_store,
        header_store,
    }
}

fn idle_loop(code: &mut Assembler) -> Option<Marks> {
    let top = code.here();
    code.inc(Reg::Rbx);
    code.mov32(Reg::Rax, Reg::Rbx);
    code.out_eax(BEAT_PORT);
    code.jmp(top);
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn program(pattern: Pattern, dirty_rate_bytes_per_s: u64) -> (Layout, Program) {
        let config = Config {
            pattern,
            dirty_rate_bytes_per_s,
            ..Config::default()
        };
        let layout = Layout::new(&config).unwrap();
        let program = Program::new(&layout);
        (layout, program)
    }

    /// The bytes are those of an independent assembler, and were read back by an independent disassembler.
    #[test]
    fn programs_have_the_octets_of_an_independent_assembler() {
        let random = "48ffc34889d8490fafc0480fc8480fafc0490fafc549f7e149891cd348c1e20c49891c12e2da49891e89d8e7e04c89e1ebce";
        let idle = "48ffc389d8e7e0ebf7";
        let hex = |octets: &[u8]| {
            octets
                .iter()
                .map(|o| format!("{o:02x}"))
                .collect::<String>()
        };
        assert_eq!(hex(&program(Pattern::Random, 1 << 20).1.octets), random);
        let sequential =
            "48ffc34889d831d249f7f149891cd348c1e20c49891c12e2e749891e89d8e7e04c89e1ebdb";
        assert_eq!(
            hex(&program(Pattern::Sequential, 1 << 20).1.octets),
            sequential
        );
        assert_eq!(hex(&program(Pattern::Random, 0).1.octets), idle);
    }

    /// The offsets are those of the instructions in the bytes above.
    #[test]
    fn progress_is_exact_at_every_instruction() {
        let (layout, program) = program(Pattern::Random, 10_000_000);
        let share = &layout.shares[0];
        let batch = share.batch;
        assert!(batch > 2);
        let at = |offset: usize| PROGRAM_PAGE * PAGE_BYTES + offset as u64;
        let of = |offset: usize, counter: u64| {
            let progress = program.progress(share, at(offset), counter).unwrap();
            (progress.last_store, progress.header)
        };
        use LastStore::*;
        assert_eq!(of(0x00, 0), (Done, 0), "before the first instruction");
        assert_eq!(
            of(0x03, 1),
            (Begun, 0),
            "the counter is up, nothing is stored"
        );
        assert_eq!(of(0x18, 1), (Begun, 0), "on the store to the log");
        assert_eq!(of(0x1c, 1), (Logged, 0), "after it");
        assert_eq!(of(0x20, 1), (Logged, 0), "on the store to the page");
        assert_eq!(of(0x24, 1), (Done, 0), "after it");
        assert_eq!(of(0x18, batch), (Begun, 0), "last store of the batch");
        assert_eq!(
            of(0x24, batch),
            (Done, 0),
            "on the loop at the end of the batch"
        );
        assert_eq!(of(0x26, batch), (Done, 0), "on the store to the header");
        assert_eq!(of(0x29, batch), (Done, batch), "after it");
        assert_eq!(of(0x00, batch), (Done, batch), "at the top again");
        assert_eq!(of(0x03, batch + 1), (Begun, batch), "in the next batch");
        assert_eq!(of(0x26, 3 * batch), (Done, 2 * batch), "third batch");
    }

    #[test]
    fn an_instruction_pointer_outside_the_program_is_refused() {
        let (layout, program) = program(Pattern::Random, 0);
        let end = PROGRAM_PAGE * PAGE_BYTES + program.octets.len() as u64;
        for rip in [0, PROGRAM_PAGE * PAGE_BYTES - 1, end, u64::MAX] {
            program.progress(&layout.shares[0], rip, 5).unwrap_err();
        }
        program.progress(&layout.shares[0], end - 1, 5).unwrap();
    }

    #[test]
    fn the_program_fits_its_page_with_room() {
        for pattern in [Pattern::Random, Pattern::Sequential] {
            let (_, program) = program(pattern, 1);
            assert!(program.octets.len() < 64);
            assert_eq!(program.page_words()[8..], [0; PAGE_WORDS - 8]);
        }
    }
}
