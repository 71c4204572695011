//! Frames as a machine hands them to its driver: encoded, numbered, ready for the channel.

use multifd_wire::{Body, Frame, Kind, Misuse, Sequence};

/// The head of one frame without a body, as it goes over the channel.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a frame that is not sent leaves a gap in the numbers of its channel"]
pub struct Encoded {
    kind: Kind,
    bytes: Vec<u8>,
}

impl Encoded {
    /// What kind of frame it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// What is to be sent, all at once.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Numbers the frames of one direction of one channel.
#[derive(Debug, Default)]
pub(crate) struct Encoder {
    next: Sequence,
}

impl Encoder {
    /// The next frame of this channel.
    pub(crate) fn encode(&mut self, frame: &Frame<'_>) -> Result<Encoded, Misuse> {
        let mut bytes = Vec::new();
        frame.encode(self.next, Body::None, &mut bytes)?;
        self.next = self.next.next();
        Ok(Encoded {
            kind: frame.kind(),
            bytes,
        })
    }
}
