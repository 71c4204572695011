//! A real migration that dials for ever, asked and steered by its control socket.

use std::collections::BTreeSet;
use std::error::Error;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use multifd_control::client::{Client, ClientError, Heard};
use multifd_control::{CLIENTS_MAX, Control, Door, End, INTERFACE, MESSAGE_BYTES_MAX, NAME};
use multifd_sender as tx;
use multifd_transport::memory::RegionLayout;
use multifd_transport::{Channel, GuestMemory};
use multifd_wire::ChannelRef;
use serde_json::{Value, json};
use zlink_core::idl::Interface;

/// A machine that does nothing.
struct Nothing;

impl tx::Vmm for Nothing {
    fn config(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        Ok(Vec::new())
    }

    fn pause(&mut self) -> Result<(), tx::VmmError> {
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<tx::Blob>, tx::VmmError> {
        Ok(Vec::new())
    }

    fn resume(&mut self, _: tx::Reclaimed) -> Result<(), tx::VmmError> {
        Ok(())
    }
}

/// Nobody answers, for as long as is waited.
struct Nobody;

impl tx::Dial for Nobody {
    fn dial(
        &self,
        _: ChannelRef,
        deadline: Instant,
    ) -> Result<Box<dyn Channel>, Box<dyn Error + Send + Sync>> {
        std::thread::sleep(deadline.saturating_duration_since(Instant::now()));
        Err("nobody answers".into())
    }
}

struct Served {
    path: PathBuf,
    control: Control,
    migration: tx::Migration,
}

fn serve() -> Served {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!(
        "multifd-control-{}-{}.sock",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    );
    let path = std::env::temp_dir().join(name);
    let region = RegionLayout {
        guest_address: 0,
        bytes: 1 << 20,
    };
    let minutes = Duration::from_secs(600);
    let parts = tx::Parts {
        vmm: Box::new(Nothing),
        memory: GuestMemory::anonymous(&[region]).unwrap(),
        sources: Vec::new(),
        dial: Box::new(Nobody),
        config: tx::Config::builder()
            .hello_deadline(minutes)
            .build()
            .unwrap(),
        spawner: None,
    };
    let migration = tx::Migration::start(parts).expect("a migration");
    let door = Door::bind(&path).unwrap();
    let control = door.serve(migration.handle()).unwrap();
    Served {
        path,
        control,
        migration,
    }
}

impl Served {
    fn client(&self) -> Client {
        Client::connect(&self.path).unwrap()
    }

    fn end(self) {
        self.migration.handle().cancel();
        let outcome = self.migration.wait().report.outcome;
        assert_eq!(outcome, tx::OutcomeKind::Cancelled);
        self.control.end(End::new(
            "cancelled",
            Some(("sender.cancelled", "cancelled")),
        ));
    }
}

fn status(client: &mut Client) -> Value {
    client.call("GetStatus", &json!({})).unwrap()["status"].take()
}

/// Waits until the status is like this: a change is heeded by another thread.
fn until(client: &mut Client, like: impl Fn(&Value) -> bool) -> Value {
    let began = Instant::now();
    loop {
        let now = status(client);
        if like(&now) {
            return now;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{now}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn refused(client: &mut Client, method: &str, parameters: &Value) -> String {
    match client.call(method, parameters) {
        Err(ClientError::Refused { name, .. }) => name,
        other => panic!("{method}: {other:?}"),
    }
}

#[test]
fn the_socket_is_its_owners_alone_and_goes_with_it() {
    let served = serve();
    let path = served.path.clone();
    let mode = std::fs::symlink_metadata(&path)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(Door::bind(&path).is_err(), "somebody listens there");
    served.end();
    assert!(!path.exists());
}

#[test]
fn the_interface_is_varlink_and_names_what_there_is() {
    let served = serve();
    let mut client = served.client();
    let info = client
        .call_whole("org.varlink.service.GetInfo", &json!({}))
        .unwrap();
    assert!(
        info["interfaces"]
            .as_array()
            .unwrap()
            .contains(&json!(NAME))
    );
    let asked = json!({ "interface": NAME });
    let described = client
        .call_whole("org.varlink.service.GetInterfaceDescription", &asked)
        .unwrap();
    assert_eq!(described["description"], INTERFACE);
    let interface = Interface::try_from(INTERFACE).expect("valid Varlink");
    assert_eq!(interface.name(), NAME);
    for method in interface.methods() {
        let refusal = match client.call(method.name(), &json!({})) {
            Err(ClientError::Refused { name, .. }) => name,
            other => format!("{other:?}"),
        };
        assert!(!refusal.contains("MethodNotFound"), "{}", method.name());
    }
    // What is told is what the interface says, name by name.
    let text = INTERFACE.split("type Status (").nth(1).unwrap();
    let text = text.split("\n)").next().unwrap();
    let fields = text.lines().filter_map(|line| line.trim().split_once(": "));
    let fields: BTreeSet<&str> = fields.map(|(name, _)| name).collect();
    let told = status(&mut served.client());
    for name in told.as_object().unwrap().keys() {
        assert!(fields.contains(name.as_str()), "{name}");
    }
    let unknown = client
        .call_whole("org.example.Nothing", &json!({}))
        .unwrap_err()
        .to_string();
    assert!(unknown.contains("InterfaceNotFound"), "{unknown}");
    assert_eq!(
        refused(&mut client, "Nothing", &json!({})),
        "org.varlink.service.MethodNotFound"
    );
    assert_eq!(
        refused(&mut client, "Watch", &json!({})),
        "org.varlink.service.ExpectedMore"
    );
    // It was cancelled by its method.
    assert_eq!(
        served.migration.wait().report.outcome,
        tx::OutcomeKind::Cancelled
    );
}

#[test]
fn limits_are_changed_all_together_or_not_at_all() {
    let served = serve();
    let mut client = served.client();
    let changes = json!({ "bandwidth_cap_bytes_per_s": 8 << 20, "downtime_limit_ms": 1500.0, "max_rounds": 7,
        "if_not_converging": "switch", "throttle_limit_percent": 80 });
    client.call("SetLimits", &changes).unwrap();
    let now = until(&mut client, |now| {
        now["limits"]["throttle_limit_percent"] == 80
    });
    for (name, value) in changes.as_object().unwrap() {
        assert_eq!(&now["limits"][name], value, "{name}");
    }
    // A cap of nothing is none; what is not named stays.
    client
        .call("SetLimits", &json!({ "bandwidth_cap_bytes_per_s": 0 }))
        .unwrap();
    let now = until(&mut client, |now| {
        now["limits"]["bandwidth_cap_bytes_per_s"].is_null()
    });
    assert_eq!(now["limits"]["max_rounds"], 7);
    for (bad, error) in [
        (
            json!({ "max_rounds": 9, "downtime_limit_ms": 0.0 }),
            "OutOfRange",
        ),
        (
            json!({ "max_rounds": 9, "downtime_limit_ms": -1.0 }),
            "OutOfRange",
        ),
        (
            json!({ "max_rounds": 9, "throttle_limit_percent": 100 }),
            "OutOfRange",
        ),
        (
            json!({ "max_rounds": 9, "colour": "blue" }),
            "InvalidParameter",
        ),
        (json!({ "max_rounds": "many" }), "InvalidParameter"),
    ] {
        let name = refused(&mut client, "SetLimits", &bad);
        assert!(name.ends_with(error), "{bad}: {name}");
    }
    client.call("Hold", &json!({})).unwrap();
    let now = until(&mut client, |now| now["limits"]["sending_held"] == true);
    assert_eq!(
        now["limits"]["max_rounds"], 7,
        "nothing of what was refused"
    );
    client.call("GoOn", &json!({})).unwrap();
    until(&mut client, |now| now["limits"]["sending_held"] == false);
    client.call("SwitchOverNow", &json!({})).unwrap();
    served.end();
}

#[test]
fn who_watches_hears_what_happens_and_how_it_ends() {
    let served = serve();
    let mut watcher = served.client();
    let (tell, told) = std::sync::mpsc::channel();
    let watching = std::thread::spawn(move || {
        watcher.watch(|event| {
            let _ = tell.send(event.clone());
            Heard::More
        })
    });
    let hear = || {
        told.recv_timeout(Duration::from_secs(20))
            .expect("an event")
    };
    assert_eq!(hear()["event"], "started");
    served.client().call("Hold", &json!({})).unwrap();
    let limits = std::iter::repeat_with(hear)
        .find(|event| event["event"] == "limits")
        .unwrap();
    assert_eq!(limits["status"]["limits"]["sending_held"], true);
    assert_eq!(limits["status"]["side"], "source");
    served.end();
    let last = told.iter().last().unwrap();
    assert_eq!(last["event"], "failed");
    assert_eq!(last["status"]["end"]["outcome"], "cancelled");
    assert_eq!(last["status"]["end"]["code"], "sender.cancelled");
    watching.join().unwrap().unwrap();
}

#[test]
fn a_message_without_end_and_too_many_clients_are_sent_away() {
    let served = serve();
    let mut endless = UnixStream::connect(&served.path).unwrap();
    let chunk = vec![b' '; 4096];
    let mut sent = 0;
    while endless.write_all(&chunk).is_ok() {
        sent += chunk.len();
        assert!(sent < 16 * MESSAGE_BYTES_MAX + (4 << 20), "{sent}");
    }
    let mut nonsense = UnixStream::connect(&served.path).unwrap();
    nonsense.write_all(b"no json\0").unwrap();
    assert_eq!(nonsense.read(&mut [0; 16]).unwrap_or(0), 0, "closed");

    let mut seats: Vec<Client> = Vec::new();
    let began = Instant::now();
    while seats.len() < CLIENTS_MAX as usize {
        let mut client = served.client();
        // Those from before may not have left yet.
        match client.call("GetStatus", &json!({})) {
            Ok(_) => seats.push(client),
            Err(error) => assert!(began.elapsed() < Duration::from_secs(20), "{error}"),
        }
    }
    let mut one_more = served.client();
    one_more.call("GetStatus", &json!({})).unwrap_err();
    status(&mut seats[0]);
    seats.pop();
    let began = Instant::now();
    while served.client().call("GetStatus", &json!({})).is_err() {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "a seat is free again"
        );
    }
    served.end();
}

/// It asks for events and never reads one.
fn sleeper(path: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(path).unwrap();
    let call = json!({ "method": format!("{NAME}.Watch"), "parameters": {}, "more": true });
    stream.write_all(format!("{call}\0").as_bytes()).unwrap();
    stream
}

#[test]
fn a_slow_reader_keeps_nobody_waiting() {
    let served = serve();
    let _sleepers: Vec<_> = (0..CLIENTS_MAX - 1)
        .map(|_| sleeper(&served.path))
        .collect();
    let mut client = served.client();
    let handle = served.migration.handle();
    for rounds in 1..400 {
        handle.steer(tx::Steer::MaxRounds(rounds)).unwrap();
        let began = Instant::now();
        status(&mut client);
        assert!(began.elapsed() < Duration::from_secs(10));
        // As often as who watches looks: more than a socket holds, in the end.
        std::thread::sleep(Duration::from_millis(20));
    }
    until(&mut client, |now| now["limits"]["max_rounds"] == 399);
    let began = Instant::now();
    served.end();
    assert!(
        began.elapsed() < Duration::from_secs(30),
        "{:?}",
        began.elapsed()
    );
}
