//! The structures of libibverbs and librdmacm that this crate touches, as their headers (`infiniband/verbs.h`, `rdma/rdma_cma.h`,
//! rdma-core) lay them out on 64-bit Linux. Their layout is the libraries' promise for the life of `libibverbs.so.1` and
//! `librdmacm.so.1`.
//!
//! Rule: sizes and offsets are asserted when this is compiled, against what a C compiler says of those headers.

use std::ffi::{c_int, c_void};
use std::mem::{offset_of, size_of};

/// A pointer into the libraries.
pub(super) type Raw = *mut c_void;

/// `struct ibv_context`: the device's calls on the fast path are in a table of pointers.
#[repr(C)]
pub(super) struct Context {
    pub(super) device: Raw,
    pub(super) ops: [Raw; 32],
}

/// Indexes in [`Context::ops`].
pub(super) const OP_POLL_CQ: usize = 11;
pub(super) const OP_REQ_NOTIFY_CQ: usize = 12;
pub(super) const OP_POST_SEND: usize = 25;
pub(super) const OP_POST_RECV: usize = 26;

/// `struct ibv_mr`.
#[repr(C)]
pub(super) struct MemoryRegion {
    pub(super) context: Raw,
    pub(super) pd: Raw,
    pub(super) address: Raw,
    pub(super) length: usize,
    pub(super) handle: u32,
    pub(super) lkey: u32,
    pub(super) rkey: u32,
}

/// The start of `struct ibv_comp_channel`.
#[repr(C)]
pub(super) struct CompletionChannel {
    pub(super) context: *mut Context,
    pub(super) fd: c_int,
    pub(super) refcnt: c_int,
}

/// `struct ibv_qp_cap`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct QpCap {
    pub(super) max_send_wr: u32,
    pub(super) max_recv_wr: u32,
    pub(super) max_send_sge: u32,
    pub(super) max_recv_sge: u32,
    pub(super) max_inline_data: u32,
}

/// `struct ibv_qp_init_attr`.
#[repr(C)]
pub(super) struct QpInit {
    pub(super) qp_context: Raw,
    pub(super) send_cq: Raw,
    pub(super) recv_cq: Raw,
    pub(super) srq: Raw,
    pub(super) cap: QpCap,
    pub(super) qp_type: u32,
    pub(super) sq_sig_all: c_int,
}

/// `IBV_QPT_RC`: reliable, connected.
pub(super) const QPT_RC: u32 = 2;

/// `struct ibv_sge`: one piece of registered memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sge {
    pub(crate) address: u64,
    pub(crate) length: u32,
    pub(crate) lkey: u32,
}

/// `struct ibv_send_wr`, with the union's member for writes.
#[repr(C)]
pub(super) struct SendWr {
    pub(super) id: u64,
    pub(super) next: *mut SendWr,
    pub(super) sg_list: *mut Sge,
    pub(super) num_sge: c_int,
    pub(super) opcode: u32,
    pub(super) flags: u32,
    pub(super) imm: u32,
    pub(super) remote_address: u64,
    pub(super) rkey: u32,
    pub(super) rest: [u32; 19],
}

pub(super) const WR_RDMA_WRITE: u32 = 0;
pub(super) const WR_SEND: u32 = 2;
pub(super) const SEND_SIGNALED: u32 = 2;

/// `struct ibv_recv_wr`.
#[repr(C)]
pub(super) struct RecvWr {
    pub(super) id: u64,
    pub(super) next: *mut RecvWr,
    pub(super) sg_list: *mut Sge,
    pub(super) num_sge: c_int,
}

/// `struct ibv_wc`: a completion.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Completion {
    pub(crate) id: u64,
    pub(crate) status: u32,
    pub(crate) opcode: u32,
    pub(crate) vendor_err: u32,
    pub(crate) byte_len: u32,
    imm: u32,
    qp_num: u32,
    src_qp: u32,
    flags: u32,
    pkey_index: u16,
    slid: u16,
    sl: u8,
    dlid_path_bits: u8,
}

/// `IBV_WC_WR_FLUSH_ERR`: the queue pair was in its error state.
pub(crate) const WC_FLUSHED: u32 = 5;

pub(super) const ACCESS_LOCAL_WRITE: c_int = 1;
pub(super) const ACCESS_REMOTE_WRITE: c_int = 2;

/// `struct ibv_device_attr`, of which three numbers are read.
#[repr(C)]
pub(super) struct DeviceAttr {
    before: [u64; 14],
    pub(super) max_qp_wr: c_int,
    flags: u32,
    pub(super) max_sge: c_int,
    max_sge_rd: c_int,
    max_cq: c_int,
    pub(super) max_cqe: c_int,
    after: [u32; 24],
}

/// `struct rdma_cm_id`, of which the start is read.
#[repr(C)]
pub(super) struct CmId {
    pub(super) verbs: *mut Context,
    pub(super) channel: Raw,
    pub(super) context: Raw,
    pub(super) qp: Raw,
    pub(super) source: [u8; 128],
    pub(super) target: [u8; 128],
}

/// `struct rdma_event_channel`.
#[repr(C)]
pub(super) struct EventChannel {
    pub(super) fd: c_int,
}

/// `struct rdma_conn_param`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct ConnParam {
    pub(super) private_data: *const u8,
    pub(super) private_data_len: u8,
    pub(super) responder_resources: u8,
    pub(super) initiator_depth: u8,
    pub(super) flow_control: u8,
    pub(super) retry_count: u8,
    pub(super) rnr_retry_count: u8,
    pub(super) srq: u8,
    pub(super) qp_num: u32,
}

/// `struct rdma_cm_event`.
#[repr(C)]
pub(super) struct CmEvent {
    pub(super) id: *mut CmId,
    pub(super) listen_id: *mut CmId,
    pub(super) event: u32,
    pub(super) status: c_int,
    pub(super) conn: ConnParam,
    rest: [u64; 4],
}

/// `RDMA_PS_TCP`.
pub(super) const PORT_SPACE_TCP: u32 = 0x106;

const _: () = {
    assert!(offset_of!(Context, ops) == 8 && size_of::<Context>() == 264);
    assert!(size_of::<MemoryRegion>() == 48);
    assert!(offset_of!(MemoryRegion, lkey) == 36 && offset_of!(MemoryRegion, rkey) == 40);
    assert!(offset_of!(CompletionChannel, fd) == 8 && size_of::<CompletionChannel>() == 16);
    assert!(size_of::<QpCap>() == 20 && size_of::<QpInit>() == 64);
    assert!(offset_of!(QpInit, cap) == 32 && offset_of!(QpInit, qp_type) == 52);
    assert!(offset_of!(QpInit, sq_sig_all) == 56);
    assert!(size_of::<Sge>() == 16 && size_of::<SendWr>() == 128 && size_of::<RecvWr>() == 32);
    assert!(offset_of!(SendWr, sg_list) == 16 && offset_of!(SendWr, opcode) == 28);
    assert!(offset_of!(SendWr, remote_address) == 40 && offset_of!(SendWr, rkey) == 48);
    assert!(size_of::<Completion>() == 48 && offset_of!(Completion, byte_len) == 20);
    assert!(size_of::<DeviceAttr>() == 232 && offset_of!(DeviceAttr, max_qp_wr) == 112);
    assert!(offset_of!(DeviceAttr, max_sge) == 120 && offset_of!(DeviceAttr, max_cqe) == 132);
    assert!(offset_of!(CmId, qp) == 24 && offset_of!(CmId, source) == 32);
    assert!(offset_of!(CmId, target) == 160);
    assert!(size_of::<ConnParam>() == 24 && offset_of!(ConnParam, qp_num) == 16);
    assert!(size_of::<CmEvent>() == 80 && offset_of!(CmEvent, conn) == 24);
};
