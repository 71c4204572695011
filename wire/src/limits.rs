//! Every bound of the format, in one place. Source: SPEC, section "Limits".
//!
//! A number from the peer is compared with one of these before it reaches an allocation, a slice or an addition.
//! Each constant says where its value comes from; raising one is a change of the format's version (SPEC EXT-6).

/// Octets of a frame's table. The largest table that a kind defines (ZEROS, 32,784 octets) fits twice. SPEC: LIMIT-1
pub const TABLE_BYTES_MAX: usize = 65_536;

/// Octets of a frame's body: 1 MiB, past which a larger body no longer saves system calls. SPEC: LIMIT-2
pub const BODY_BYTES_MAX: usize = 1_048_576;

/// [`BODY_BYTES_MAX`] for arithmetic in the width that stream offsets have.
pub const BODY_BYTES_MAX_U64: u64 = 1_048_576;

/// Pages in one PAGES frame: what fills [`BODY_BYTES_MAX`]. SPEC: LIMIT-3
pub const PAGES_PER_FRAME_MAX: usize = 256;

/// Runs in one PAGES frame: one per page when nothing is contiguous. SPEC: LIMIT-4
pub const RUNS_PER_PAGES_MAX: usize = 256;

/// Runs in one ZEROS frame: half of [`TABLE_BYTES_MAX`]. SPEC: LIMIT-5
pub const RUNS_PER_ZEROS_MAX: usize = 2048;

/// Runs in one GIVE_BACK frame: it answers one PAGES frame. SPEC: LIMIT-6
pub const RUNS_PER_GIVE_BACK_MAX: usize = RUNS_PER_PAGES_MAX;

/// Regions of guest memory. SPEC: LIMIT-7
pub const REGIONS_MAX: usize = 1024;

/// Devices whose state travels. SPEC: LIMIT-8
pub const DEVICES_MAX: usize = 256;

/// Data channels of one session; lane numbers are below it. SPEC: LIMIT-9
pub const LANES_MAX: usize = 256;

/// Octets of one blob (CONFIG or VM_STATE) over all its parts: 16 MiB. SPEC: LIMIT-10
pub const BLOB_BYTES_MAX: u64 = 16_777_216;

/// Blobs of one kind of frame (CONFIG or VM_STATE) in one session. SPEC: LIMIT-11
pub const BLOBS_MAX: usize = 64;

/// Octets of the text of an ABORT. SPEC: LIMIT-12
pub const TEXT_BYTES_MAX: usize = 512;

/// Octets of the text of a refusal: what is left in the fixed reply. SPEC: LIMIT-13
pub const REPLY_TEXT_BYTES_MAX: usize = 136;

/// Octets of a device's name. SPEC: LIMIT-14
pub const DEVICE_NAME_BYTES_MAX: usize = 64;

/// Pages over all regions: 4 PiB of guest memory, and what a digest term has room for. SPEC: LIMIT-15
pub const MEMORY_PAGES_MAX: u64 = 1 << 40;

/// The largest round number; the value above it is kept free so that "no round" can be said. SPEC: LIMIT-16
pub const ROUND_MAX: u32 = u32::MAX - 1;

/// Octets in one device's stream: far more than a device has, and far from where an addition could wrap. SPEC: LIMIT-17
pub const DEVICE_STREAM_BYTES_MAX: u64 = 1 << 48;

/// Carried streams of one session: a connection per data channel of QEMU (255), post-copy, and recoveries. SPEC: LIMIT-18
pub const STREAMS_MAX: usize = 1024;

/// Octets of one direction of a carried stream: guests of 4 PiB, copied sixteen times over. SPEC: LIMIT-19
pub const STREAM_BYTES_MAX: u64 = 1 << 56;

/// Streams in one STREAM_CREDIT frame: 6 KiB of table. SPEC: LIMIT-20
pub const STREAM_CREDITS_MAX: usize = 256;

/// Parameters of a hello and of a reply: what fits where neither grows. SPEC: LIMIT-21
pub const PARAMETERS_MAX: usize = 6;
