//! Which KVM memory slot holds which pages of which region.

use crate::{Error, Run};

/// One memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The slot as KVM's dirty calls name it: `address space << 16 | slot`.
    pub id: u32,
    /// The region that the slot's memory belongs to.
    pub region: u32,
    /// The page of the region that is the slot's page 0.
    pub first: u64,
    /// The slot's pages.
    pub pages: u64,
}

impl Slot {
    /// The whole slot as a run of its region.
    pub fn run(&self) -> Run {
        Run {
            region: self.region,
            first: self.first,
            count: self.pages,
        }
    }
}

/// All slots of a VM that hold guest memory to be migrated.
#[derive(Clone, Debug)]
pub struct Slots {
    /// Sorted by id.
    slots: Vec<Slot>,
}

/// `KVM_MEM_MAX_NR_PAGES`: the pages that one slot can have.
const SLOT_PAGES_MAX: u64 = (1 << 31) - 1;

impl Slots {
    /// The slots of a VM; the same memory must not be named under the same id twice. Two slots may show the same pages.
    ///
    /// # Errors
    /// [`Error::Misuse`] if there is no slot, an id comes twice, or a slot is empty or bigger than KVM allows.
    pub fn new(mut slots: Vec<Slot>) -> Result<Self, Error> {
        let misuse = |what: String| Err(Error::Misuse { what });
        slots.sort_by_key(|slot| slot.id);
        if slots.is_empty() {
            return misuse("a KVM source needs at least one memory slot".into());
        }
        for slot in &slots {
            if slot.pages == 0
                || slot.pages > SLOT_PAGES_MAX
                || slot.first.checked_add(slot.pages).is_none()
            {
                return misuse(format!(
                    "slot {:#x} has {} pages; 1 to {SLOT_PAGES_MAX} are allowed",
                    slot.id, slot.pages
                ));
            }
        }
        if let Some(pair) = slots.windows(2).find(|pair| pair[0].id == pair[1].id) {
            return misuse(format!("slot {:#x} is named twice", pair[0].id));
        }
        Ok(Self { slots })
    }

    /// The slots, sorted by id.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.slots.iter()
    }

    /// The slot of that id.
    pub(crate) fn find(&self, id: u32) -> Option<&Slot> {
        self.slots
            .binary_search_by_key(&id, |slot| slot.id)
            .ok()
            .map(|at| &self.slots[at])
    }

    /// Refuses slots that do not fit the set's regions.
    pub(crate) fn check(&self, set: &crate::DirtySet) -> Result<(), Error> {
        self.slots
            .iter()
            .try_for_each(|slot| set.check(slot.run()).map(|_| ()))
    }
}
