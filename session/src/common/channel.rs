//! A channel's failure, as far as the protocol has to know it.

use std::error::Error;
use std::fmt;

/// Why a channel failed: the transport's own error, and the two facts about it that matter here.
///
/// The machines know no transport, so its error comes as a cause that is only shown to the user.
#[derive(Debug)]
pub struct ChannelFault {
    code: &'static str,
    sent_nothing: bool,
    cause: Box<dyn Error + Send + Sync>,
}

impl ChannelFault {
    /// The code of a peer that speaks something else, whose cause says what.
    pub const STRANGER: &'static str = "channel-stranger";

    /// The code of a channel that TLS refused; the text says why.
    pub const TLS: &'static str = "channel-tls";

    /// `code` is the stable name of this failure. `sent_nothing`: if the channel failed while it sent, it certainly took nothing, so
    /// that the peer can have none of it.
    pub fn new(
        code: &'static str,
        sent_nothing: bool,
        cause: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Self {
        Self {
            code,
            sent_nothing,
            cause: cause.into(),
        }
    }

    /// A stable identifier, the same in every version.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// Whether the channel certainly took nothing of what it was to send.
    #[must_use]
    pub fn sent_nothing(&self) -> bool {
        self.sent_nothing
    }
}

impl fmt::Display for ChannelFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cause.fmt(f)
    }
}

impl Error for ChannelFault {
    /// The cause is what is shown, so it is not a cause of its own once more.
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.source()
    }
}
