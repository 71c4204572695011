//! What `--help` says beside the flags.

/// What it is, in a line.
pub(crate) const ABOUT: &str =
    "Live-migrate the guest of another process, the VMM, over many channels at once";

/// What it is.
pub(crate) const LONG_ABOUT: &str = "\
Live-migrate the guest of another process, the VMM, over many channels at once.

One engine runs beside each of the two VMMs, for one migration. The VMM hands it the guest's memory (files of \
memfd, tmpfs or hugetlbfs) and a way to find dirty pages, over a Unix socket, and answers a handful of calls: \
pause, save, load, run. A VMM speaks that protocol with one header in C (multifd_engine.h) or one crate in Rust \
(multifd-engine, module client); PROTOCOL.md specifies it.

If an engine is killed the guest goes on: at the source, unless the commit may have been sent. In that case the \
VMM keeps it paused, and says so to the next engine, which asks the destination whose the guest is.";

/// After `-h`.
pub(crate) const SHORT: &str = "\
Examples:
  multifd-engine receive --vmm /run/vm7.sock --listen 0.0.0.0:4444        on the destination, first
  multifd-engine send --vmm /run/vm7.sock --connect dest:4444             then on the source

Flags: multifd-engine send --help, multifd-engine receive --help";

/// After `--help`.
pub(crate) const LONG: &str = "\
Examples:
  on the destination, then on the source; each VMM listens at /run/vm7.sock (SOCK_SEQPACKET):
    multifd-engine receive --vmm /run/vm7.sock --listen 0.0.0.0:4444
    multifd-engine send --vmm /run/vm7.sock --connect dest:4444 --channels 8
  encrypted and authenticated, both sides with certificates of one authority (CA):
    multifd-engine receive --vmm /run/vm7.sock --listen tls:0.0.0.0:4444 --tls-ca ca.pem --tls-cert d.pem --tls-key d.key
    multifd-engine send --vmm /run/vm7.sock --connect tls:dest:4444 --tls-ca ca.pem --tls-cert s.pem --tls-key s.key
  started by the VMM itself, with a socket as its standard input:
    multifd-engine send --vmm - --connect dest:4444
  an engine was killed: the same command again. It migrates, or says whose the guest is. (A destination's VMM
  whose machine was taken down takes no other guest: start it anew.)
    multifd-engine receive --vmm /run/vm7.sock --listen 0.0.0.0:4444
    multifd-engine send --vmm /run/vm7.sock --connect dest:4444

Exit status: multifd-engine send --help, multifd-engine receive --help";

/// After `send --help`.
pub(crate) const SEND: &str = "\
Signals: Ctrl-C (SIGINT), SIGTERM and SIGHUP cancel the migration; the guest goes on running at the source.
  SIGUSR1 switches over when the round under way is over. SIGKILL loses no guest: see multifd-engine --help.

Exit status:
  0  migrated; or, where an earlier engine died: the guest is the destination's
  1  failed; or, where an earlier engine died: it was not committed. The guest runs at the source
  2  wrong usage; nothing was begun
  3  cancelled; the guest runs on at the source
  4  outcome unknown: the guest stays paused at the source. Start the engine again when the destination
     can be reached
  6  the destination has the guest and could not run it: it is paused on both sides
  7  the guest shut down or crashed at the source meanwhile: it runs nowhere";

/// After `receive --help`.
pub(crate) const RECEIVE: &str = "\
Signals: Ctrl-C (SIGINT), SIGTERM and SIGHUP end the reception, and the guest stays the source's; once the
  guest is here they only end the time in which the source may ask.

Exit status:
  0  the guest is this VMM's: it runs, or is paused as it was at the source
  1  failed or cancelled; the guest is the source's
  2  wrong usage; nothing was begun
  6  the guest is this VMM's, which could not run it";
