//! Every kind of channel of this crate passes the whole suite, with roomy buffers and with tiny ones.

use std::time::{Duration, Instant};

use multifd_transport::{
    Address, Channel, Listener, TcpOptions, conformance_tests, connect, memory, unix,
};

conformance_tests!(in_memory, || memory::pair(memory::PAIR_CAPACITY_DEFAULT));
conformance_tests!(in_memory_tiny, || memory::pair(4_099));
conformance_tests!(unix_pair, || unix::pair().expect("a socket pair"));
conformance_tests!(unix_path, unix_path_pair);
conformance_tests!(tcp, || tcp_pair("127.0.0.1:0", TcpOptions::default()));
conformance_tests!(tcp_v6, || tcp_pair("[::1]:0", TcpOptions::default()));
// The kernel makes some kilobytes of these: every send of a few pages is a partial one. A receive buffer of less than a few
// thousand bytes would leave the pace to TCP's persist timer.
conformance_tests!(tcp_tiny, || tcp_pair(
    "127.0.0.1:0",
    TcpOptions {
        send_buffer: Some(1),
        receive_buffer: Some(8192),
        ..TcpOptions::default()
    }
));

fn tcp_pair(address: &str, options: TcpOptions) -> (Box<dyn Channel>, Box<dyn Channel>) {
    listen_and_connect(&address.parse().expect("an address"), &options)
}

fn unix_path_pair() -> (Box<dyn Channel>, Box<dyn Channel>) {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "multifd-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    );
    let address = Address::unix(&std::env::temp_dir().join(name)).expect("a short path");
    listen_and_connect(&address, &TcpOptions::default())
}

fn listen_and_connect(
    address: &Address,
    options: &TcpOptions,
) -> (Box<dyn Channel>, Box<dyn Channel>) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let listener = Listener::bind(address, options).expect("a free address");
    let dialled = connect(listener.local_address(), options, deadline).expect("a connection");
    let (accepted, _peer) = listener.accept(Some(deadline)).expect("the connection");
    (dialled, accepted)
}
