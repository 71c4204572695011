//! What lies in the guest's memory, and what was sent of it.

use std::collections::{BTreeMap, BTreeSet};

use multifd_wire::digest::page_value;
use multifd_wire::{Digest, PageIndex, RegionId};

/// A region and a page of it.
pub(super) type Page = (u32, u64);

/// The values of pages that are not zero.
#[derive(Default)]
struct Values(BTreeMap<Page, u32>);

impl Values {
    // SPEC: DIGEST-3
    fn digest(&self) -> Digest {
        let mut digest = Digest::EMPTY;
        for ((region, page), value) in &self.0 {
            digest.replace(RegionId::new(*region), PageIndex::new(*page), 0, *value);
        }
        digest
    }
}

#[derive(Default)]
pub(super) struct Memory {
    sent: Values,
    lies: Values,
    pub(super) damaged: BTreeSet<Page>,
    /// Pages and pages of zeros that landed since a round was closed.
    pub(super) landed: (u64, u64),
    /// What each round has sent, since the start or the newest resume.
    rounds: BTreeMap<u32, BTreeSet<Page>>,
}

impl Memory {
    /// A page is sent; gives whether it is the first time in its round.
    pub(super) fn send(&mut self, round: u32, page: Page, crc: Option<u32>) -> bool {
        self.sent.0.insert(page, crc.map_or(0, page_value));
        self.rounds.entry(round).or_default().insert(page)
    }

    /// A page arrives as it should.
    pub(super) fn land(&mut self, page: Page, crc: Option<u32>) {
        self.damaged.remove(&page);
        self.lies.0.insert(page, crc.map_or(0, page_value));
        match crc {
            Some(_) => self.landed.0 += 1,
            None => self.landed.1 += 1,
        }
    }

    /// A page arrives with other octets than its checksum says (SPEC: DIGEST-6).
    pub(super) fn damage(&mut self, page: Page, crc: u32) {
        self.damaged.insert(page);
        self.lies.0.insert(page, page_value(crc));
    }

    pub(super) fn begin_again(&mut self) {
        self.rounds.clear();
    }

    pub(super) fn digest_sent(&self) -> Digest {
        self.sent.digest()
    }

    pub(super) fn digest(&self) -> Digest {
        self.lies.digest()
    }
}
