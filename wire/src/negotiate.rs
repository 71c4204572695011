//! Negotiation: what a hello and an offer give. Pure; sessions, tickets and resources are the caller's to check.
//!
//! The destination calls [`answer`] (or [`refuse`] when the hello is no hello), the source calls [`accept`] on the reply.
//! Both sides then hold the same version and the same features.

use crate::VERSION;
use crate::code::Reason;
use crate::error::{Incompatible, Malformed};
use crate::feature::Features;
use crate::hello::{HELLO_BYTES, Hello, Intent, VersionRange};
use crate::hello_reply::HelloReply;
use crate::id::SessionId;
use crate::parameter::Parameters;

/// What the destination can do and what it insists on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The versions that it speaks.
    pub versions: VersionRange,
    /// The features that it can use.
    pub features: Features,
    /// Those of them without which it does not go on.
    pub required: Features,
}

impl Offer {
    /// All that this version has, and nothing required.
    pub const ALL: Self = Self {
        versions: VersionRange::OURS,
        features: Features::KNOWN,
        required: Features::NONE,
    };

    /// The offer for a channel of a session that exists: exactly what its control channel agreed on.
    // SPEC: JOIN-2
    #[must_use]
    pub const fn exactly(agreed: Agreement) -> Self {
        let versions = match VersionRange::new(agreed.version, agreed.version) {
            Some(versions) => versions,
            None => VersionRange::OURS,
        };
        Self {
            versions,
            features: agreed.features,
            required: agreed.features,
        }
    }
}

/// What two sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// The version to be spoken.
    pub version: u16,
    /// The features to be used.
    pub features: Features,
}

/// The destination's answer to a hello, as far as version and features decide it.
// SPEC: VER-2, FEAT-1, FEAT-3
#[must_use]
pub fn answer(hello: &Hello, offer: &Offer) -> HelloReply {
    let session = hello.session;
    let Some(version) = hello.versions.newest_common(offer.versions) else {
        return refuse_version(hello.versions, offer.versions, session);
    };
    let missing = hello.features_mandatory.without(offer.features);
    if !missing.is_empty() {
        return HelloReply::refused(
            Reason::Feature,
            &format!("not offered here: {missing}"),
            session,
        );
    }
    let wanted = hello.features_mandatory.union(hello.features_optional);
    let missing = offer.required.without(wanted);
    if !missing.is_empty() {
        return HelloReply::refused(
            Reason::Feature,
            &format!("required here: {missing}"),
            session,
        );
    }
    // No feature of this version has values; those of others are passed over (SPEC: PARAM-3).
    HelloReply::accepted(version, wanted.intersection(offer.features), session)
}

/// The answer to octets that [`Hello::decode`] refused: a peer of a later version is told so, any other what is wrong.
// SPEC: VER-3, HELLO-10
#[must_use]
pub fn refuse(octets: &[u8; HELLO_BYTES], error: &Malformed, offer: &Offer) -> HelloReply {
    match Hello::peek(octets) {
        Ok((versions, session)) if versions.newest_common(offer.versions).is_none() => {
            refuse_version(versions, offer.versions, session)
        }
        Ok((_, session)) => HelloReply::refused(error.reason(), &error.to_string(), session),
        Err(_) => HelloReply::refused(error.reason(), &error.to_string(), SessionId::new([0; 16])),
    }
}

/// The source's side: checks that the reply answers the hello.
///
/// # Errors
/// [`Incompatible`]: the destination refused, or agreed to something that was not asked for.
// SPEC: REPLY-5, REPLY-6
pub fn accept(hello: &Hello, reply: &HelloReply) -> Result<Agreement, Incompatible> {
    let (version, features, session, parameters) = match *reply {
        HelloReply::Accepted {
            version,
            features,
            session,
            parameters,
        } => (version, features, session, parameters),
        HelloReply::Refused { reason, text, .. } => {
            let text = text.as_str().into();
            return Err(Incompatible::Refused { reason, text });
        }
    };
    if session != hello.session {
        return Err(Incompatible::Session);
    }
    if !hello.versions.contains(version) {
        return Err(Incompatible::Version { version });
    }
    let wanted = hello.features_mandatory.union(hello.features_optional);
    if !features.contains(hello.features_mandatory) || !wanted.contains(features) {
        return Err(Incompatible::Features { agreed: features });
    }
    // SPEC: PARAM-2
    if hello.intent != Intent::Start && parameters != Parameters::NONE {
        return Err(Incompatible::Parameters);
    }
    Ok(Agreement { version, features })
}

/// A refusal that says which versions each side speaks.
fn refuse_version(theirs: VersionRange, ours: VersionRange, session: SessionId) -> HelloReply {
    let text = format!(
        "versions {} to {} offered, {} to {} spoken here",
        theirs.min(),
        theirs.max(),
        ours.min(),
        ours.max()
    );
    HelloReply::refused(Reason::Version, &text, session)
}

const _: () = assert!(VERSION >= 1);
