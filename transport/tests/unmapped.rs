//! Memory goes with its last clone. A program of its own: beside other tests the address could be mapped again at once.

use std::fs;

use multifd_transport::GuestMemory;
use multifd_transport::memory::RegionLayout;

#[test]
fn memory_is_unmapped_with_the_last_clone() {
    let layout = RegionLayout {
        guest_address: 0,
        bytes: 64 << 20,
    };
    let memory = GuestMemory::anonymous(&[layout]).unwrap();
    let address = memory.span(0, 0, 1).unwrap().as_ptr().addr();
    assert!(is_mapped(address));
    drop(memory.clone());
    assert!(is_mapped(address));
    drop(memory);
    assert!(!is_mapped(address));
}

/// Whether a line of `/proc/self/maps` ("from-to ...", hexadecimal) holds the address.
fn is_mapped(address: usize) -> bool {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().any(|line| {
        let range = line.split(' ').next().unwrap();
        let (from, to) = range.split_once('-').unwrap();
        let number = |text| usize::from_str_radix(text, 16).unwrap();
        (number(from)..number(to)).contains(&address)
    })
}
