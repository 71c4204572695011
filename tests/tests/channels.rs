//! Kinds of channel as a user chooses them: TLS with certificates, several kinds in one migration, and what is said when one cannot be
//! had.

use std::fs;
use std::path::{Path, PathBuf};

use multifd_tests::programs::{Ended, Process};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair,
};

const SMALL: &[&str] = &[
    "--memory",
    "64M",
    "--working-set",
    "16M",
    "--dirty-rate",
    "20M",
    "--warm-up",
    "50ms",
    "--report",
    "json",
];

/// Files of an authority and of the certificates that it signed, removed at the end.
struct Certificates {
    folder: PathBuf,
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Certificates {
    fn new(name: &str) -> Self {
        let folder =
            std::env::temp_dir().join(format!("multifd-channels-{}-{name}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder for temporary files");
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        let authority = CertifiedIssuer::self_signed(params, key).expect("an authority");
        fs::write(folder.join("ca.pem"), authority.pem()).expect("a file");
        let made = Self { folder, authority };
        made.certify("source");
        made.certify("destination");
        made
    }

    fn certify(&self, name: &str) {
        let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).expect("an address");
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate().expect("a key");
        let certificate = params
            .signed_by(&key, &self.authority)
            .expect("a certificate");
        fs::write(self.path(&format!("{name}.pem")), certificate.pem()).expect("a file");
        fs::write(self.path(&format!("{name}.key")), key.serialize_pem()).expect("a file");
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    /// The flags of a side that trusts this authority and shows its own certificate.
    fn flags(&self, side: &str) -> Vec<String> {
        let path = |file: &str| text(&self.path(file));
        vec![
            "--tls-ca".into(),
            path("ca.pem"),
            "--tls-cert".into(),
            path(&format!("{side}.pem")),
            "--tls-key".into(),
            path(&format!("{side}.key")),
        ]
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn text(path: &Path) -> String {
    path.to_str().expect("a plain name").to_owned()
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

fn receive(flags: &[String]) -> Process {
    let mut all = strings(&["--run-for", "100ms", "--report", "json", "--one-attempt"]);
    all.extend_from_slice(flags);
    Process::start("multifd-receive", &all)
}

fn send(flags: &[String]) -> Process {
    let mut all = strings(SMALL);
    all.extend_from_slice(flags);
    Process::start("multifd-send", &all)
}

fn assert_moved(sent: &Ended, received: &Ended) {
    assert_eq!(sent.status, Some(0), "{sent}\n{received}");
    assert_eq!(sent.report()["digest_equal"], true, "{sent}");
    assert_eq!(received.report()["guest_check"], "passed", "{received}");
}

/// The guest stayed where it was, and the receiver was told to end.
fn assert_stayed(sent: &Ended) -> String {
    let report = sent.report();
    assert_eq!(sent.status, Some(1), "{sent}");
    assert_eq!(report["source_guest_runs"], true, "{sent}");
    report["error"]["text"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn two_programs_move_a_guest_by_tls_and_know_each_other() {
    let certificates = Certificates::new("both");
    let mut flags = strings(&["--listen", "tls:127.0.0.1:0"]);
    flags.extend(certificates.flags("destination"));
    let receiver = receive(&flags);
    let mut flags = strings(&["--connect", &receiver.announced(), "--channels", "3"]);
    flags.extend(certificates.flags("source"));
    let sent = send(&flags).end();
    let received = receiver.end();
    assert_moved(&sent, &received);
    assert!(
        received.errors.contains("tls 127.0.0.1:"),
        "every channel is one of TLS: {received}"
    );
    assert!(!received.errors.contains("tcp 127.0.0.1:"), "{received}");
}

#[test]
fn a_source_without_a_certificate_is_turned_away_and_its_guest_runs_on() {
    let certificates = Certificates::new("absent");
    let mut flags = strings(&["--listen", "tls:127.0.0.1:0"]);
    flags.extend(certificates.flags("destination"));
    let receiver = receive(&flags);
    let ca = text(&certificates.path("ca.pem"));
    let sent = send(&strings(&[
        "--connect",
        &receiver.announced(),
        "--tls-ca",
        &ca,
    ]))
    .end();
    let why = assert_stayed(&sent);
    assert!(why.contains("asks for a certificate"), "{why}");
    receiver.interrupt();
    assert_eq!(receiver.end().status, Some(1));
}

#[test]
fn a_destination_of_another_authority_is_not_trusted() {
    let (ours, theirs) = (Certificates::new("ours"), Certificates::new("theirs"));
    let mut flags = strings(&["--listen", "tls:127.0.0.1:0"]);
    flags.extend(theirs.flags("destination"));
    let receiver = receive(&flags);
    let mut flags = strings(&["--connect", &receiver.announced()]);
    flags.extend(ours.flags("source"));
    let sent = send(&flags).end();
    let why = assert_stayed(&sent);
    assert!(
        why.contains("no authority (CA) that was given here signed it"),
        "{why}"
    );
    receiver.interrupt();
    assert_eq!(receiver.end().status, Some(1));
}

#[test]
fn one_migration_takes_channels_of_several_kinds() {
    let certificates = Certificates::new("mixed");
    let mut flags = strings(&[
        "--loopback",
        "--transport",
        "tls,tcp,unix",
        "--channels",
        "5",
    ]);
    // Both sides of a loopback show the same certificate.
    flags.extend(certificates.flags("source"));
    let sent = send(&flags).end();
    let report = sent.report();
    assert_eq!(sent.status, Some(0), "{sent}");
    assert_eq!(report["guest_check"], "passed", "{sent}");
    assert_eq!(report["digest_equal"], true, "{sent}");
    for kind in ["tls 127.0.0.1:", "tcp 127.0.0.1:", "unix → "] {
        assert!(sent.errors.contains(kind), "no {kind} in {sent}");
    }
}

#[test]
fn what_a_kind_of_channel_lacks_is_said_before_anything_is_begun() {
    let cases: [(&[&str], &str); 4] = [
        (&["--connect", "tls:127.0.0.1:9"], "--tls-ca"),
        (
            &["--connect", "127.0.0.1:9", "--transport", "tls"],
            "--tls-ca",
        ),
        (
            &["--connect", "127.0.0.1:9", "--transport", "tcp,unix"],
            "--data",
        ),
        (&["--connect", "quic:127.0.0.1:9"], "is not an address"),
    ];
    for (flags, word) in cases {
        let sent = send(&strings(flags)).end();
        assert_eq!(sent.status, Some(2), "{sent}");
        assert!(sent.errors.contains(word), "{word}: {sent}");
    }
    let received = receive(&strings(&["--listen", "tls:127.0.0.1:0"])).end();
    assert_eq!(received.status, Some(2), "{received}");
    assert!(received.errors.contains("--tls-cert"), "{received}");
}
