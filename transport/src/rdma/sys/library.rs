//! libibverbs and librdmacm, opened when they are first needed.
//!
//! Rule: a host without them runs everything else; what is missing is said in words that help to mend it.
#![allow(unsafe_code)] // Opening a library and taking functions out of it has no safe form.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::Library;

use super::layout::{
    CmEvent, CmId, CompletionChannel, ConnParam, Context, DeviceAttr, EventChannel, MemoryRegion,
    QpInit, Raw,
};

macro_rules! functions {
    ($($library:ident = $file:literal { $($name:ident: fn($($argument:ty),*) $(-> $result:ty)?;)* })*) => {
        /// The functions that are used, under their own names.
        pub(super) struct Functions {
            $($(pub(super) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*)*
            _libraries: Vec<Library>,
        }

        fn load() -> Result<Functions, String> {
            $(let $library = open($file)?;)*
            Ok(Functions {
                $($($name: {
                    // SAFETY: the signature is that of the library's header.
                    let found = unsafe { $library.get(concat!(stringify!($name), "\0").as_bytes()) };
                    *found.map_err(|error| format!("{}: {error}", stringify!($library)))?
                },)*)*
                _libraries: vec![$($library),*],
            })
        }
    };
}

functions! {
    ibverbs = "libibverbs.so.1" {
        ibv_get_device_list: fn(*mut c_int) -> *mut Raw;
        ibv_free_device_list: fn(*mut Raw);
        ibv_query_device: fn(*mut Context, *mut DeviceAttr) -> c_int;
        ibv_alloc_pd: fn(*mut Context) -> Raw;
        ibv_dealloc_pd: fn(Raw) -> c_int;
        ibv_reg_mr: fn(Raw, *mut c_void, usize, c_int) -> *mut MemoryRegion;
        ibv_dereg_mr: fn(*mut MemoryRegion) -> c_int;
        ibv_create_comp_channel: fn(*mut Context) -> *mut CompletionChannel;
        ibv_destroy_comp_channel: fn(*mut CompletionChannel) -> c_int;
        ibv_create_cq: fn(*mut Context, c_int, Raw, *mut CompletionChannel, c_int) -> Raw;
        ibv_destroy_cq: fn(Raw) -> c_int;
        ibv_get_cq_event: fn(*mut CompletionChannel, *mut Raw, *mut Raw) -> c_int;
        ibv_ack_cq_events: fn(Raw, u32);
        ibv_wc_status_str: fn(u32) -> *const c_char;
    }
    rdmacm = "librdmacm.so.1" {
        rdma_create_event_channel: fn() -> *mut EventChannel;
        rdma_destroy_event_channel: fn(*mut EventChannel);
        rdma_create_id: fn(*mut EventChannel, *mut *mut CmId, Raw, u32) -> c_int;
        rdma_destroy_id: fn(*mut CmId) -> c_int;
        rdma_migrate_id: fn(*mut CmId, *mut EventChannel) -> c_int;
        rdma_bind_addr: fn(*mut CmId, *mut c_void) -> c_int;
        rdma_listen: fn(*mut CmId, c_int) -> c_int;
        rdma_resolve_addr: fn(*mut CmId, *mut c_void, *mut c_void, c_int) -> c_int;
        rdma_resolve_route: fn(*mut CmId, c_int) -> c_int;
        rdma_create_qp: fn(*mut CmId, Raw, *mut QpInit) -> c_int;
        rdma_destroy_qp: fn(*mut CmId);
        rdma_connect: fn(*mut CmId, *mut ConnParam) -> c_int;
        rdma_accept: fn(*mut CmId, *mut ConnParam) -> c_int;
        rdma_reject: fn(*mut CmId, *const c_void, u8) -> c_int;
        rdma_disconnect: fn(*mut CmId) -> c_int;
        rdma_get_cm_event: fn(*mut EventChannel, *mut *mut CmEvent) -> c_int;
        rdma_ack_cm_event: fn(*mut CmEvent) -> c_int;
        rdma_event_str: fn(u32) -> *const c_char;
    }
}

fn open(name: &str) -> Result<Library, String> {
    // SAFETY: the constructors of rdma-core's libraries register device drivers and have no demands on who opens them.
    unsafe { Library::new(name) }.map_err(|error| {
        format!(
            "RDMA needs {name}, which is not here ({error}): install rdma-core (libibverbs, librdmacm and the drivers, on Debian: \
             ibverbs-providers and librdmacm1)"
        )
    })
}

/// The functions, or why they cannot be had.
pub(super) fn functions() -> Result<&'static Functions, String> {
    static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();
    FUNCTIONS.get_or_init(load).as_ref().map_err(Clone::clone)
}
