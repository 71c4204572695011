//! How a Linux kernel is put into fresh guest memory, and where the first processor begins: Linux's 64-bit boot protocol.
//!
//! ```text
//!   0x500 GDT   0x7000 boot parameters   0x9000 page tables (first GiB, identity)   0x20000 command line   0xe0000 ACPI
//!   0x100000 kernel (bzImage without its real-mode part) …                                            … initrd at the end
//! ```
//! Source: `Documentation/arch/x86/boot.rst` and `zero-page.rst`.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::KernelLoader as _;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{Bytes as _, GuestAddress};

use crate::acpi;
use crate::machine::Memory;

const GDT: u64 = 0x500;
const ZERO_PAGE: u64 = 0x7000;
const PAGE_MAP: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x2_0000;
/// Where memory that BIOSes used to keep for themselves begins and ends.
const LEGACY_HOLE: std::ops::Range<u64> = 0x9_fc00..0x10_0000;
/// A 64-bit entry is so far behind the start of a bzImage's protected-mode part.
const ENTRY_64: u64 = 0x200;

const CODE: u16 = 0x10;
const DATA: u16 = 0x18;

/// What the first processor is given.
pub(crate) struct Entry {
    pub(crate) regs: kvm_regs,
    gdt: Vec<u64>,
}

/// Loads the kernel, the initial file system and everything that the kernel wants to be told. `memory` is one piece that begins at 0.
///
/// # Errors
/// A file that cannot be read or is no bzImage, or too little memory.
pub(crate) fn load(
    memory: &Memory,
    bytes: u64,
    kernel: &Path,
    initrd: Option<&Path>,
    command_line: &str,
    cpus: u8,
) -> Result<Entry> {
    let mut image = File::open(kernel).with_context(|| kernel.display().to_string())?;
    let start = GuestAddress(LEGACY_HOLE.end);
    let loaded = BzImage::load(memory, None, &mut image, Some(start))
        .with_context(|| format!("{} is no bzImage that fits", kernel.display()))?;
    let mut params = boot_params {
        hdr: loaded.setup_header.context("a bzImage has a header")?,
        ..Default::default()
    };
    let longest = params.hdr.cmdline_size;
    ensure!(
        command_line.len() < longest as usize && command_line.is_ascii(),
        "the command line has more than {longest} characters, or some that are not ASCII"
    );
    memory.write_slice(command_line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    params.hdr.cmd_line_ptr = u32::try_from(COMMAND_LINE)?;
    params.hdr.type_of_loader = 0xff;
    if let Some(path) = initrd {
        let mut content = Vec::new();
        let mut file = File::open(path).with_context(|| path.display().to_string())?;
        file.read_to_end(&mut content)?;
        let top = bytes.min(u64::from(params.hdr.initrd_addr_max) + 1);
        let at = top.checked_sub(content.len() as u64).map(|at| at & !0xfff);
        let at = at.filter(|&at| at > loaded.kernel_end);
        let at = at.context("the initial file system does not fit behind the kernel")?;
        memory.write_slice(&content, GuestAddress(at))?;
        params.hdr.ramdisk_image = u32::try_from(at)?;
        params.hdr.ramdisk_size = u32::try_from(content.len())?;
    }
    const RAM: u32 = 1;
    let ram = |from: u64, to: u64| boot_e820_entry {
        addr: from,
        size: to - from,
        r#type: RAM,
    };
    params.e820_table[0] = ram(0, LEGACY_HOLE.start);
    params.e820_table[1] = ram(LEGACY_HOLE.end, bytes);
    params.e820_entries = 2;
    params.acpi_rsdp_addr = acpi::write(memory, cpus)?;
    memory.write_obj(params, GuestAddress(ZERO_PAGE))?;

    // One table of each level, and the first GiB in pages of 2 MiB.
    const PRESENT_WRITABLE: u64 = 0b11;
    const HUGE: u64 = 1 << 7;
    let tables = [PAGE_MAP, PAGE_MAP + 0x1000, PAGE_MAP + 0x2000];
    memory.write_obj(tables[1] | PRESENT_WRITABLE, GuestAddress(tables[0]))?;
    memory.write_obj(tables[2] | PRESENT_WRITABLE, GuestAddress(tables[1]))?;
    for page in 0..512_u64 {
        let entry = page << 21 | HUGE | PRESENT_WRITABLE;
        memory.write_obj(entry, GuestAddress(tables[2] + page * 8))?;
    }
    // Two empty entries; flat 64-bit code; flat data.
    let gdt = vec![0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (descriptor, at) in gdt.iter().zip((GDT..).step_by(8)) {
        memory.write_obj(*descriptor, GuestAddress(at))?;
    }
    Ok(Entry {
        regs: kvm_regs {
            rip: loaded.kernel_load.0 + ENTRY_64,
            rsi: ZERO_PAGE,
            rflags: 2, // the bit that is always set
            ..Default::default()
        },
        gdt,
    })
}

impl Entry {
    /// 64-bit mode with the page tables above, from what a fresh processor has.
    pub(crate) fn sregs(&self, fresh: kvm_sregs) -> kvm_sregs {
        let code = kvm_segment {
            selector: CODE,
            limit: u32::MAX,
            type_: 11, // execute, read, accessed
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment {
            selector: DATA,
            type_: 3, // read, write, accessed
            l: 0,
            db: 1,
            ..code
        };
        let mut sregs = kvm_sregs {
            cs: code,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            cr0: fresh.cr0 | 1 << 31 | 1, // paging, protection
            cr3: PAGE_MAP,
            cr4: fresh.cr4 | 1 << 5,             // physical address extension
            efer: fresh.efer | 1 << 10 | 1 << 8, // long mode: active, enabled
            ..fresh
        };
        sregs.gdt.base = GDT;
        sregs.gdt.limit = (self.gdt.len() * 8 - 1) as u16;
        sregs
    }
}
