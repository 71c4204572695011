//! Parameters: the values of features that two sides tell each other in hello and reply. Source: SPEC, section "Parameters".
//!
//! ```text
//!        0       2       4               8
//!       +-------+-------+---------------+
//!       | featur| key   | value         |   six times
//!       +-------+-------+---------------+
//! ```
//!
//! The rule it keeps: a reader passes over the parameters of features that it does not know, so that a feature of tomorrow can
//! have values without breaking a reader of today.

use core::fmt;

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::Malformed;
use crate::feature::Features;
use crate::limits::PARAMETERS_MAX;

/// One place for a parameter; all zero where there is none.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    /// The number of the feature's bit, plus 1.
    feature: U16,
    key: U16,
    value: U32,
}

const _: () = assert!(size_of::<Raw>() == 8);

/// A value of a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Parameter {
    /// The number of the feature's bit, 0 to 63.
    pub bit: u8,
    /// Which of the feature's values.
    pub key: u16,
    /// The value.
    pub value: u32,
}

/// The parameters of a hello or of an acceptance: up to six, in rising order, each feature's key once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Parameters([Option<Parameter>; PARAMETERS_MAX]);

impl Parameters {
    /// No parameter.
    pub const NONE: Self = Self([None; PARAMETERS_MAX]);

    /// These parameters, in any order; `None` when they are too many, or a key is there twice, or a bit is above 63.
    #[must_use]
    pub fn new(parameters: &[Parameter]) -> Option<Self> {
        let mut sorted = parameters.to_vec();
        sorted.sort_unstable();
        let mut places = [None; PARAMETERS_MAX];
        if sorted.len() > places.len() || sorted.iter().any(|parameter| parameter.bit > 63) {
            return None;
        }
        for (place, parameter) in places.iter_mut().zip(&sorted) {
            *place = Some(*parameter);
        }
        let parameters = Self(places);
        parameters.is_rising().then_some(parameters)
    }

    /// The value of a feature's key, if it was said.
    #[must_use]
    pub fn get(&self, bit: u8, key: u16) -> Option<u32> {
        self.iter()
            .find(|parameter| (parameter.bit, parameter.key) == (bit, key))
            .map(|parameter| parameter.value)
    }

    /// Those that there are.
    pub fn iter(&self) -> impl Iterator<Item = Parameter> + '_ {
        self.0.iter().flatten().copied()
    }

    /// The features that have a parameter here.
    #[must_use]
    pub fn features(&self) -> Features {
        self.iter().fold(Features::NONE, |all, parameter| {
            let bit = 1_u64.checked_shl(u32::from(parameter.bit)).unwrap_or(0);
            all.union(Features::new(bit))
        })
    }

    /// Checks the places of a hello or reply. `features`: those that may have parameters there.
    // SPEC: PARAM-1, PARAM-2
    pub(crate) fn decode(
        field: &'static str,
        raw: &[Raw; PARAMETERS_MAX],
        features: Features,
    ) -> Result<Self, Malformed> {
        let mut places = [None; PARAMETERS_MAX];
        let mut free = None;
        for (place, raw) in places.iter_mut().zip(raw) {
            let refused = Malformed::Value {
                field,
                value: u64::from(raw.feature.get()),
            };
            let Some(bit) = raw.feature.get().checked_sub(1) else {
                if raw.as_bytes().iter().any(|octet| *octet != 0) {
                    return Err(Malformed::Reserved { field });
                }
                free = Some(());
                continue;
            };
            let bit = u8::try_from(bit).ok().filter(|bit| *bit <= 63);
            let (Some(bit), None) = (bit, free) else {
                return Err(refused);
            };
            *place = Some(Parameter {
                bit,
                key: raw.key.get(),
                value: raw.value.get(),
            });
        }
        let parameters = Self(places);
        if !parameters.is_rising() || !features.contains(parameters.features()) {
            return Err(Malformed::Value {
                field,
                value: parameters.features().value(),
            });
        }
        Ok(parameters)
    }

    /// The places as they travel.
    pub(crate) fn encode(&self) -> [Raw; PARAMETERS_MAX] {
        self.0.map(|place| match place {
            None => Raw {
                feature: U16::ZERO,
                key: U16::ZERO,
                value: U32::ZERO,
            },
            Some(parameter) => Raw {
                feature: U16::new(u16::from(parameter.bit).saturating_add(1)),
                key: U16::new(parameter.key),
                value: U32::new(parameter.value),
            },
        })
    }

    fn is_rising(&self) -> bool {
        let key = |parameter: Parameter| (parameter.bit, parameter.key);
        self.iter().map(key).is_sorted_by(|one, next| one < next)
    }
}

impl fmt::Debug for Parameters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
