//! What `--help` says after the flags.

/// What it is, in a line. Given here because a comment on a flattened struct of flags would take its place.
pub(crate) const ABOUT: &str =
    "Live-migrate a running guest to another process or host, over many channels at once";

/// What it is.
pub(crate) const LONG_ABOUT: &str = "\
Live-migrate a running guest to another process or host, over many channels at once.

multifd-send starts the built-in guest (a small real KVM machine that keeps writing its memory; without /dev/kvm
the same work is done by threads, and it says so), migrates it to a multifd-receive by pre-copy, and prints what
happened.";

/// After `-h`.
pub(crate) const SHORT: &str = "\
Examples:
  multifd-send --loopback                                     a demonstration on this host
  multifd-receive --listen 0.0.0.0:4444                       on the destination, first
  multifd-send --connect dest:4444 --channels 8               then on the source

More flags, devices, exit status and more examples: --help";

/// After `--help`.
pub(crate) const LONG: &str = "\
Examples:
  a demonstration on this host:
    multifd-send --loopback
  on the destination, then on the source:
    multifd-receive --listen 0.0.0.0:4444
    multifd-send --connect dest:4444 --channels 8 --memory 8G --dirty-rate 500MB/s
  encrypted and authenticated, both sides with certificates of one authority (CA):
    multifd-receive --listen tls:0.0.0.0:4444 --tls-ca ca.pem --tls-cert dest.pem --tls-key dest.key
    multifd-send --connect tls:dest:4444 --tls-ca ca.pem --tls-cert source.pem --tls-key source.key
  two kinds of channel in one migration, half of the data channels on each:
    multifd-receive --listen 0.0.0.0:4444 --listen rdma:10.0.0.2:4445
    multifd-send --connect dest:4444 --data dest:4444 --data rdma:10.0.0.2:4445 --channels 4
  a guest that does not converge (see the advice in the error):
    multifd-send --loopback --dirty-rate 2GB/s --bandwidth 4Gbit/s
  to learn how it ended even if this program is killed (within multifd-receive's --suspend):
    multifd-send --connect dest:4444 --state-file /run/vm7.state
    multifd-send --ask /run/vm7.state
  over a link that comes and goes:
    multifd-send --connect dest:4444 --reconnect-deadline 10min
  a guest that is paused, and arrives paused:
    multifd-send --loopback --start-paused
  is there a writer of guest memory that tells nobody? (here there is one)
    multifd-send --loopback --debug-dirty-scan --guest-device dma-unreported
  an unmodified QEMU (QMP; capability return-path on both sides), over encrypted channels:
    dest QMP:  migrate-incoming {\"uri\": \"unix:/run/vm/in.sock\"}      (started with -incoming defer)
    multifd-receive --bridge unix:/run/vm/in.sock --listen tls:0.0.0.0:4444 --tls-ca ca.pem --tls-cert dest.pem --tls-key dest.key
    multifd-send --bridge unix:/run/vm/out.sock --connect tls:dest:4444 --tls-ca ca.pem --tls-cert src.pem --tls-key src.key
    source QMP:  migrate {\"uri\": \"unix:/run/vm/out.sock\"}
  the same by libvirt:
    virsh migrate --live --p2p VM qemu+tls://dest/system --migrateuri unix:///run/vm/out.sock
  Cloud Hypervisor:
    ch-remote --api-socket dest.sock receive-migration unix:/run/vm/in.sock
    ch-remote --api-socket source.sock send-migration unix:/run/vm/out.sock
  for programs, at the end or all along:
    multifd-send --loopback --report json | jq .downtime_ms
    multifd-send --loopback --progress json | jq -c 'select(.event == \"round\")'
  with two devices, of which one gives most of its state while the guest runs:
    multifd-send --loopback --device model:name=a,size=100M,initial=80M,growth=1M \\
                            --device model:name=b,size=50M,config=4K

Devices:
  model:KEY=VALUE,...   a device without hardware, whose content is checked where it is loaded
    name=NAME           its name, the same on both sides
    size=SIZE           its whole state
    initial=SIZE        of it, read and loaded before the guest is paused
    growth=SIZE         what it changes in a second while it runs
    read=SIZE write=SIZE  how fast it can be read and loaded, in a second
    config=SIZE         its configuration, loaded after the rest
    reinit=N            how often it announces new initial bytes
    p2p=no              it has no P2P-quiescent state: then it can only be moved alone
    ack=no pre-copy=yes after-memory=yes seed=N
    fail=WHAT           read@SIZE, write@SIZE, corrupt@SIZE, save-config, load-config, finish,
                        step@STATE, break@STATE, hang@STATE, hang-read@SIZE or hang-write@SIZE:
                        to see what a failure does

Units: sizes as 64M or 64MiB (powers of 1024) or 64MB (powers of 1000); rates as 100MB/s, 1.5GiB/s or
  10Gbit/s; times as 300ms, 1.5s, 2min or 1h 30m, at most 24h.

Signals: Ctrl-C (SIGINT), SIGTERM and SIGHUP cancel the migration; the guest goes on running here. More of
  them change nothing: SIGQUIT (Ctrl-\\) ends the program at once, and the guest with it. SIGUSR1 switches over
  when the round under way is over, whatever the forecast says and however long the pause gets.

Exit status:
  0  migrated
  1  failed; the guest runs on at the source
  2  wrong usage; nothing was begun
  3  cancelled; the guest runs on at the source
  4  outcome unknown: the commit was sent, and the destination could not be asked
     what came of it; the guest stays paused at the source
  5  migrated, but the guest's own check found an error
  6  the destination has the guest and could not run it: it is paused on both sides
  7  the guest shut down or crashed at the source meanwhile: it runs nowhere
With --ask: 0 the guest runs at the destination; 1 it was not committed and never will be;
  4 still unknown; 6 the destination has the guest and could not run it; 2 no such file

Log: RUST_LOG=info (or debug) writes to standard error.";
