//! System calls: what no thread of the process needs, and what the threads that read a peer's bytes do need.
//!
//! A refused call fails with EPERM. It does not kill: a guest runs in the process, and may have been taken over already.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::Error;

/// Whether programs may be started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Exec {
    /// No.
    #[default]
    Forbidden,
    /// Yes: a bridge starts its keeper.
    Allowed,
}

const STARTS_PROGRAMS: &[libc::c_long] = &[libc::SYS_execve, libc::SYS_execveat];

/// Ways to other processes, to the machine as a whole, to namespaces, and around this filter.
const NOBODY_NEEDS: &[libc::c_long] = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsmount,
    libc::SYS_fsconfig,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_quotactl,
    libc::SYS_personality,
];

/// What a thread needs that takes a peer's bytes from a channel and puts them where they belong.
const READERS_NEED: &[libc::c_long] = &[
    // Channels.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_close,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_fcntl,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    libc::SYS_splice,
    // Memory.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Waiting, and the time.
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    // Being a thread, and ending.
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // What the log is written to, and panics.
    libc::SYS_lseek,
    libc::SYS_fstat,
];

/// ioctls of channels: how much waits in a socket, and RDMA's verbs. None of KVM's or VFIO's.
const IOCTLS: &[u64] = &[
    libc::FIONREAD,
    libc::TIOCOUTQ,
    libc::FIONBIO,
    RDMA_VERBS_IOCTL,
];

/// `RDMA_VERBS_IOCTL` (include/uapi/rdma/rdma_user_ioctl.h).
const RDMA_VERBS_IOCTL: u64 = 0xc018_1b01;

/// Denies in every thread of the process what nobody needs.
pub(crate) fn restrict_process(exec: Exec) -> Result<(), Error> {
    let starts = match exec {
        Exec::Forbidden => STARTS_PROGRAMS,
        Exec::Allowed => &[],
    };
    let denied = NOBODY_NEEDS.iter().chain(starts);
    let rules = denied.map(|call| (*call, Vec::new())).collect();
    let program = compile(rules, SeccompAction::Allow, REFUSED)?;
    seccompiler::apply_filter_all_threads(&program)?;
    Ok(())
}

/// The filter of a thread that reads a peer's bytes.
pub(crate) fn reader() -> Result<BpfProgram, Error> {
    let mut rules: Rules = READERS_NEED
        .iter()
        .map(|call| (*call, Vec::new()))
        .collect();
    let ioctls = IOCTLS
        .iter()
        .map(|request| rule(1, SeccompCmpOp::Eq, *request));
    rules.insert(libc::SYS_ioctl, ioctls.collect::<Result<_, _>>()?);
    // No new code: neither mapped nor made.
    let no_code = || rule(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0);
    rules.insert(libc::SYS_mmap, vec![no_code()?]);
    rules.insert(libc::SYS_mprotect, vec![no_code()?]);
    // A thread's own name, and nothing else that prctl does.
    let name = rule(0, SeccompCmpOp::Eq, libc::PR_SET_NAME as u64)?;
    rules.insert(libc::SYS_prctl, vec![name]);
    compile(rules, REFUSED, SeccompAction::Allow)
}

type Rules = BTreeMap<libc::c_long, Vec<SeccompRule>>;

const REFUSED: SeccompAction = SeccompAction::Errno(libc::EPERM as u32);

fn rule(argument: u8, compare: SeccompCmpOp, value: u64) -> Result<SeccompRule, Error> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compare, value);
    let rule = condition.and_then(|condition| SeccompRule::new(vec![condition]));
    rule.map_err(|error| Error::Calls(error.into()))
}

fn compile(
    rules: Rules,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, Error> {
    let filter = SeccompFilter::new(rules, otherwise, listed, TargetArch::x86_64);
    let program = filter.and_then(TryInto::try_into);
    program.map_err(|error| Error::Calls(error.into()))
}
