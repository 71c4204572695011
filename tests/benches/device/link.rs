//! What the benchmark runs over: a link of a known rate between two network namespaces, or the loopback interface.
//!
//! ```text
//!   namespace mfd-<pid>-s              namespace mfd-<pid>-d
//!     veth 10.213.7.1  ── tbf rate ──►   veth 10.213.7.2
//! ```
//! Only the direction from source to destination is shaped, at the source's queue, as a network card does it. The namespaces
//! are there for as long as the value lives. What it must never do: touch an interface that it did not make.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, bail};
use multifd_sender as tx;
use multifd_transport::{Channel, Listener, TcpOptions};
use multifd_wire::ChannelRef;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The destination's address on the shaped link.
const THERE: &str = "10.213.7.2";

/// Bytes that may pass at once, and that may wait. A burst is 2 ms of 4 Gbit/s; a socket never has more than some milliseconds
/// in the queue (TCP small queues), so that nothing is dropped there.
const BURST: &str = "1mb";
const LIMIT: &str = "32mb";

/// A link.
pub(crate) struct Link {
    /// The two namespaces; none for loopback.
    names: Option<[String; 2]>,
}

impl Link {
    pub(crate) fn loopback() -> Self {
        Self { names: None }
    }

    /// Makes the namespaces, and the link of this rate between them.
    ///
    /// # Errors
    /// What the host refused: it takes root, the programs `ip` and `tc`, and a kernel with veth and tbf.
    pub(crate) fn shaped(rate_mbit: u64) -> anyhow::Result<Self> {
        let pid = std::process::id();
        let link = Self {
            names: Some([format!("mfd-{pid}-s"), format!("mfd-{pid}-d")]),
        };
        let [source, destination] = link.names.as_ref().expect("made above");
        let run = |line: String| run(&line);
        run(format!("ip netns add {source}"))?;
        run(format!("ip netns add {destination}"))?;
        run(format!(
            "ip link add mfd0 netns {source} type veth peer name mfd0 netns {destination}"
        ))?;
        run(format!("ip -n {source} addr add 10.213.7.1/24 dev mfd0"))?;
        run(format!("ip -n {destination} addr add {THERE}/24 dev mfd0"))?;
        for name in [source, destination] {
            run(format!("ip -n {name} link set mfd0 up"))?;
        }
        run(format!(
            "tc -n {source} qdisc add dev mfd0 root tbf rate {rate_mbit}mbit burst {BURST} limit {LIMIT}"
        ))?;
        Ok(link)
    }

    pub(crate) fn name(&self) -> &'static str {
        if self.names.is_some() {
            "shaped"
        } else {
            "loopback"
        }
    }

    fn host(&self) -> &'static str {
        if self.names.is_some() {
            THERE
        } else {
            "127.0.0.1"
        }
    }

    /// A listener of the destination.
    pub(crate) fn listener(&self) -> Listener {
        let address = format!("{}:0", self.host()).parse().expect("an address");
        self.at(1, || Listener::bind(&address, &TcpOptions::default()))
            .expect("a port")
    }

    /// A listener of the destination, of the standard library.
    pub(crate) fn plain_listener(&self) -> TcpListener {
        self.at(1, || TcpListener::bind((self.host(), 0)))
            .expect("a port")
    }

    /// `count` connections, source first.
    pub(crate) fn plain_pairs(&self, count: usize) -> Vec<(TcpStream, TcpStream)> {
        let listener = self.plain_listener();
        let address = listener.local_addr().expect("bound");
        (0..count)
            .map(|_| {
                let ours = self.at(0, || TcpStream::connect(address)).expect("a link");
                let theirs = listener.accept().expect("a link").0;
                for socket in [&ours, &theirs] {
                    socket.set_nodelay(true).expect("TCP_NODELAY");
                }
                (ours, theirs)
            })
            .collect()
    }

    /// The same link, for a dialer of its own.
    pub(crate) fn duplicate(&self) -> Self {
        Self {
            names: self.names.clone(),
        }
    }

    /// Dials from the source's namespace.
    pub(crate) fn dial(self, inner: tx::Dialer) -> Box<dyn tx::Dial> {
        Box::new(From { link: self, inner })
    }

    /// Does something on a thread inside a namespace: 0 the source's, 1 the destination's. Sockets stay where they were made.
    fn at<T: Send>(&self, side: usize, act: impl FnOnce() -> T + Send) -> T {
        let Some(names) = &self.names else {
            return act();
        };
        let path = format!("/run/netns/{}", names[side]);
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || {
                let name_space = File::open(path).expect("the namespace was made");
                let kind = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(name_space.as_fd(), kind).expect("root may");
                act()
            });
            inside.join().expect("no panics")
        })
    }
}

/// Removes the namespaces of a benchmark that ends, with the link in them.
pub(crate) struct Cleared(pub(crate) Link);

impl Drop for Cleared {
    fn drop(&mut self) {
        for name in self.0.names.iter().flatten() {
            if let Err(error) = run(&format!("ip netns del {name}")) {
                eprintln!("{error:#}");
            }
        }
    }
}

struct From {
    link: Link,
    inner: tx::Dialer,
}

impl tx::Dial for From {
    fn dial(
        &self,
        channel: ChannelRef,
        deadline: Instant,
    ) -> Result<Box<dyn Channel>, Box<dyn std::error::Error + Send + Sync>> {
        self.link.at(0, || self.inner.dial(channel, deadline))
    }
}

fn run(line: &str) -> anyhow::Result<()> {
    let mut words = line.split(' ');
    let program = words.next().unwrap_or_default();
    let output = Command::new(program)
        .args(words)
        .output()
        .with_context(|| format!("`{program}` can't be run"))?;
    if !output.status.success() {
        bail!(
            "`{line}`: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
