//! `set_more` holds a last piece back at most until the next frame that is sent without it.

use std::time::{Duration, Instant};

use multifd_transport::{Channel, Listener, TcpOptions};

fn tcp_pair() -> (Box<dyn Channel>, Box<dyn Channel>) {
    let options = TcpOptions::default();
    let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap(), &options).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    let ours = multifd_transport::connect(listener.local_address(), &options, deadline).unwrap();
    let (theirs, _) = listener.accept(Some(deadline)).unwrap();
    (ours, theirs)
}

#[test]
fn what_was_held_back_arrives_in_order_with_the_next_frame() {
    for (ours, theirs) in [
        tcp_pair(),
        multifd_transport::unix::pair().unwrap(),
        multifd_transport::memory::pair(1 << 16),
    ] {
        let (mut tx, _rx, _closer) = ours.split();
        let (_tx, mut rx, _closer) = theirs.split();
        rx.set_deadline(Some(Instant::now() + Duration::from_secs(5)));
        tx.set_more(true);
        tx.send(b"held", &[]).unwrap();
        tx.send(b" back", &[]).unwrap();
        tx.set_more(false);
        tx.send(b", then sent", &[]).unwrap();
        let mut octets = [0; 20];
        rx.receive(&mut octets).unwrap();
        assert_eq!(&octets, b"held back, then sent");
    }
}
