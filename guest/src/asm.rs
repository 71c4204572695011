//! A very small x86-64 assembler: the instructions that the guest's program needs, and no more.
//!
//! Every method appends one instruction with 64-bit operands unless it says otherwise. Positions are bytes from the
//! start of the program, and branches go back to a position that is already known.
//!
//! ```text
//!   REX prefix 0100WRXB   W 64-bit operands, R/X/B the fourth bit of ModRM.reg / SIB.index / ModRM.rm (or SIB.base)
//!   ModRM      mod reg rm mod 3: rm is a register; mod 0: memory at [rm]; rm 4: a SIB byte follows
//!   SIB        scale index base
//! ```
//!
//! (Intel SDM volume 2, chapter 2 and the instructions' own pages.)

/// The registers that the program uses, by their number in the encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reg {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
}

/// Bytes from the start of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Position(pub(crate) usize);

/// Instructions, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    octets: Vec<u8>,
}

impl Assembler {
    /// Where the next instruction will be.
    pub(crate) fn here(&self) -> Position {
        Position(self.octets.len())
    }

    /// The program.
    pub(crate) fn into_octets(self) -> Vec<u8> {
        self.octets
    }

    /// `to = from`
    pub(crate) fn mov(&mut self, to: Reg, from: Reg) {
        self.wide(0x89, from, to);
    }

    /// `to = from`, the low 32 bits; the high ones become zero. Not for R8 and above.
    pub(crate) fn mov32(&mut self, to: Reg, from: Reg) {
        self.octets.extend([0x89, modrm(3, from, to)]);
    }

    /// `register = 0`, in its 32-bit form, which clears the high half too. Not for R8 and above.
    pub(crate) fn clear(&mut self, register: Reg) {
        self.octets.extend([0x31, modrm(3, register, register)]);
    }

    /// `register += 1`
    pub(crate) fn inc(&mut self, register: Reg) {
        self.wide_extended(0xFF, 0, register);
    }

    /// `to *= by`, the low half of the product.
    pub(crate) fn imul(&mut self, to: Reg, by: Reg) {
        self.octets
            .extend([rex(to, Reg::Rax, by), 0x0F, 0xAF, modrm(3, to, by)]);
    }

    /// `rdx:rax = rax * by`, unsigned.
    pub(crate) fn mul(&mut self, by: Reg) {
        self.wide_extended(0xF7, 4, by);
    }

    /// `rax = rdx:rax / by`, `rdx` = the remainder, unsigned.
    pub(crate) fn div(&mut self, by: Reg) {
        self.wide_extended(0xF7, 6, by);
    }

    /// Reverses the eight bytes of `register`.
    pub(crate) fn bswap(&mut self, register: Reg) {
        self.octets.extend([
            rex(Reg::Rax, Reg::Rax, register),
            0x0F,
            0xC8 + low3(register),
        ]);
    }

    /// `register <<= bits`
    pub(crate) fn shl(&mut self, register: Reg, bits: u8) {
        self.wide_extended(0xC1, 4, register);
        self.octets.push(bits);
    }

    /// `memory[base] = from`. Not for R12 and R13, whose encodings mean something else.
    pub(crate) fn store(&mut self, base: Reg, from: Reg) {
        self.octets
            .extend([rex(from, Reg::Rax, base), 0x89, modrm(0, from, base)]);
    }

    /// `memory[base + index * 2^scale] = from`. Not with R13 as the base.
    pub(crate) fn store_indexed(&mut self, base: Reg, index: Reg, scale: u8, from: Reg) {
        let sib = (scale << 6) | (low3(index) << 3) | low3(base);
        self.octets
            .extend([rex(from, index, base), 0x89, (low3(from) << 3) | 4, sib]);
    }

    /// `out port, eax`: 32 bits to an I/O port, which leaves the virtual machine.
    pub(crate) fn out_eax(&mut self, port: u8) {
        self.octets.extend([0xE7, port]);
    }

    /// `rcx -= 1`, and on to `target` unless it became zero.
    pub(crate) fn loop_to(&mut self, target: Position) {
        self.branch(0xE2, target);
    }

    /// On to `target`.
    pub(crate) fn jmp(&mut self, target: Position) {
        self.branch(0xEB, target);
    }

    /// A branch with an 8-bit distance, counted from the end of the branch.
    fn branch(&mut self, opcode: u8, target: Position) {
        let end = self.octets.len() + 2;
        let distance = i8::try_from(target.0 as i64 - end as i64);
        self.octets.extend([
            opcode,
            distance.expect("the program is shorter than 128 bytes") as u8,
        ]);
    }

    /// Opcode with two registers: `reg` in ModRM.reg, `rm` in ModRM.rm.
    fn wide(&mut self, opcode: u8, reg: Reg, rm: Reg) {
        self.octets
            .extend([rex(reg, Reg::Rax, rm), opcode, modrm(3, reg, rm)]);
    }

    /// Opcode with one register, ModRM.reg being part of the opcode.
    fn wide_extended(&mut self, opcode: u8, extension: u8, rm: Reg) {
        self.octets.extend([
            rex(Reg::Rax, Reg::Rax, rm),
            opcode,
            0xC0 | (extension << 3) | low3(rm),
        ]);
    }
}

fn low3(register: Reg) -> u8 {
    register as u8 & 7
}

fn modrm(mode: u8, reg: Reg, rm: Reg) -> u8 {
    (mode << 6) | (low3(reg) << 3) | low3(rm)
}

/// The prefix for 64-bit operands; Rax where a place is not used.
fn rex(reg: Reg, index: Reg, rm: Reg) -> u8 {
    let fourth = |register: Reg| register as u8 >> 3;
    0x48 | (fourth(reg) << 2) | (fourth(index) << 1) | fourth(rm)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn octets(write: impl FnOnce(&mut Assembler)) -> Vec<u8> {
        let mut assembler = Assembler::default();
        write(&mut assembler);
        assembler.into_octets()
    }

    /// The expected bytes are what an independent assembler and disassembler say.
    #[test]
    fn instructions_have_the_octets_that_the_manual_gives() {
        use Reg::*;
        assert_eq!(octets(|a| a.inc(Rbx)), [0x48, 0xFF, 0xC3]);
        assert_eq!(octets(|a| a.mov(Rax, Rbx)), [0x48, 0x89, 0xD8]);
        assert_eq!(octets(|a| a.mov(Rcx, R12)), [0x4C, 0x89, 0xE1]);
        assert_eq!(octets(|a| a.mov32(Rax, Rbx)), [0x89, 0xD8]);
        assert_eq!(octets(|a| a.clear(Rdx)), [0x31, 0xD2]);
        assert_eq!(octets(|a| a.imul(Rax, R8)), [0x49, 0x0F, 0xAF, 0xC0]);
        assert_eq!(octets(|a| a.imul(Rax, R13)), [0x49, 0x0F, 0xAF, 0xC5]);
        assert_eq!(octets(|a| a.mul(R9)), [0x49, 0xF7, 0xE1]);
        assert_eq!(octets(|a| a.div(R9)), [0x49, 0xF7, 0xF1]);
        assert_eq!(octets(|a| a.bswap(Rax)), [0x48, 0x0F, 0xC8]);
        assert_eq!(octets(|a| a.shl(Rdx, 12)), [0x48, 0xC1, 0xE2, 0x0C]);
        assert_eq!(octets(|a| a.store(R14, Rbx)), [0x49, 0x89, 0x1E]);
        assert_eq!(
            octets(|a| a.store_indexed(R11, Rdx, 3, Rbx)),
            [0x49, 0x89, 0x1C, 0xD3]
        );
        assert_eq!(
            octets(|a| a.store_indexed(R10, Rdx, 0, Rbx)),
            [0x49, 0x89, 0x1C, 0x12]
        );
        assert_eq!(octets(|a| a.out_eax(0xE0)), [0xE7, 0xE0]);
        assert_eq!(octets(|a| a.jmp(Position(0))), [0xEB, 0xFE]);
        assert_eq!(octets(|a| a.loop_to(Position(0))), [0xE2, 0xFE]);
    }
}
