//! What the kernel is told of the hardware: processors, interrupt controller, and two devices, as ACPI tables.
//!
//! ```text
//!   RSDP ─► XSDT ─► FADT (reduced hardware) ─► DSDT: COM1, the virtio device
//!               └─► MADT: local APICs, I/O APIC
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use anyhow::{Result, ensure};
use vm_memory::{Bytes as _, GuestAddress};

use crate::devices::{COM1, COM1_IRQ};
use crate::machine::Memory;
use crate::virtio::{VIRTIO, VIRTIO_BYTES, VIRTIO_IRQ};

/// Kernels look for the RSDP from here to 1 MiB.
const TABLES: u64 = 0xe_0000;
const TABLES_BYTES_MAX: u64 = 0x1_0000;

const OEM: [u8; 6] = *b"MFDVMM";
const TABLE: [u8; 8] = *b"EXAMPLE ";

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

/// Writes the tables; returns where the RSDP is.
///
/// # Errors
/// They do not fit.
pub(crate) fn write(memory: &Memory, cpus: u8) -> Result<u64> {
    let mut next = TABLES + Rsdp::len() as u64;
    let mut put = |table: &dyn Aml| -> Result<u64> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = next.next_multiple_of(16);
        next = at + bytes.len() as u64;
        ensure!(
            next < TABLES + TABLES_BYTES_MAX,
            "the ACPI tables do not fit"
        );
        memory.write_slice(&bytes, GuestAddress(at))?;
        Ok(at)
    };
    let dsdt = put(&Raw(dsdt()))?;
    let fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .finalize();
    let fadt = put(&fadt)?;
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(LOCAL_APIC));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    let madt = put(&madt)?;
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&xsdt)?;
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    memory.write_slice(&rsdp, GuestAddress(TABLES))?;
    Ok(TABLES)
}

struct Raw(Sdt);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(self.0.as_slice());
    }
}

fn dsdt() -> Sdt {
    let ports = IO::new(COM1, COM1, 1, 8);
    let edge = |number| Interrupt::new(true, true, false, false, number);
    let line = edge(COM1_IRQ);
    let resources = ResourceTemplate::new(vec![&ports, &line]);
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let uid = Name::new("_UID".into(), &0_u8);
    let crs = Name::new("_CRS".into(), &resources);
    let com1 = Device::new("COM1".into(), vec![&hid, &uid, &crs]);
    let registers = Memory32Fixed::new(true, VIRTIO as u32, VIRTIO_BYTES as u32);
    let line = edge(VIRTIO_IRQ);
    let resources = ResourceTemplate::new(vec![&registers, &line]);
    let hid = Name::new("_HID".into(), &"LNRO0005");
    let crs = Name::new("_CRS".into(), &resources);
    let virtio = Device::new("VIR0".into(), vec![&hid, &uid, &crs]);
    let mut body = Vec::new();
    Scope::new(Path::new("\\_SB_"), vec![&com1, &virtio]).to_aml_bytes(&mut body);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, 1);
    dsdt.append_slice(&body);
    dsdt
}
