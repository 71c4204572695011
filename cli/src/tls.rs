//! TLS: where certificates are, who the peer may be, and what may go in clear text.
#![allow(rustdoc::broken_intra_doc_links)] // comments on flags are the text of --help, as it is, and no links

use std::path::{Path, PathBuf};

use multifd_transport::Address;
use multifd_transport::tls::{Clients, PeerName, TlsClient, TlsFiles, TlsServer, TlsSide};

/// The flags of both programs.
#[derive(Debug, clap::Args)]
pub struct TlsFlags {
    /// Certificate of the authority (CA) that must have signed the other side's
    ///
    /// In PEM form. Files are read again for each connection, so that a renewed certificate is used from then on.
    #[arg(long, value_name = "FILE", help_heading = "TLS")]
    pub tls_ca: Option<PathBuf>,

    /// This side's own certificate, with the chain to the authority if there is one
    ///
    /// multifd-receive needs it for tls: addresses; multifd-send shows it to a destination that asks for one.
    #[arg(long, value_name = "FILE", requires = "tls_key", help_heading = "TLS")]
    pub tls_cert: Option<PathBuf>,

    /// The private key of --tls-cert
    #[arg(long, value_name = "FILE", requires = "tls_cert", help_heading = "TLS")]
    pub tls_key: Option<PathBuf>,

    /// A directory with all three, as QEMU or a Kubernetes secret lays it out, instead of --tls-ca, --tls-cert and --tls-key
    ///
    /// ca-cert.pem with server-cert.pem and server-key.pem (multifd-receive) or client-cert.pem and client-key.pem
    /// (multifd-send); or ca.crt, tls.crt and tls.key.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["tls_ca", "tls_cert", "tls_key"], hide_short_help = true, help_heading = "TLS")]
    pub tls_dir: Option<PathBuf>,

    /// Only a peer whose certificate is for this name: a host name, an address, or a SPIFFE ID such as spiffe://domain/path; may be given many times
    ///
    /// Without it multifd-receive takes any source that the authority signed, and multifd-send asks for the host that it dials.
    #[arg(
        long,
        value_name = "NAME",
        hide_short_help = true,
        help_heading = "TLS"
    )]
    pub tls_peer: Vec<PeerName>,

    /// Send clear text on addresses that are not tls:, although certificates are given
    ///
    /// Whoever is on the way between the hosts can then read and change what goes there.
    #[arg(long, hide_short_help = true, help_heading = "TLS")]
    pub clear_text: bool,
}

impl TlsFlags {
    /// What a side that dials needs; nothing if no authority was given. `server_name`: whom the certificate must be for, if not the host.
    ///
    /// # Errors
    /// Files that can't be used, or names that are none.
    pub fn client(&self, server_name: Option<&str>) -> anyhow::Result<Option<TlsClient>> {
        let files = self.files(TlsSide::Client)?;
        let Some(files) = files.filter(|files| files.authorities.is_some()) else {
            return Ok(None);
        };
        let mut client = TlsClient::from_files(files)?;
        if let Some(name) = server_name {
            client = client.with_server_name(name)?;
        }
        if !self.tls_peer.is_empty() {
            client = client.with_peers(self.tls_peer.clone())?;
        }
        Ok(Some(client))
    }

    /// What a side that listens needs; nothing if no certificate was given. `any_source`: whoever connects is let in.
    ///
    /// # Errors
    /// Files that can't be used; nothing is said of who may connect.
    pub fn server(&self, any_source: bool) -> anyhow::Result<Option<TlsServer>> {
        let files = self.files(TlsSide::Server)?;
        let Some(files) = files.filter(|files| files.certificate.is_some()) else {
            return Ok(None);
        };
        anyhow::ensure!(
            files.authorities.is_some() || any_source,
            "TLS needs --tls-ca, the certificate of the authority (CA) that signed the sources'; --tls-any-source lets anybody in"
        );
        let clients = match (any_source, &self.tls_peer[..]) {
            (true, _) => Clients::Anybody,
            (false, []) => Clients::OfAuthority,
            (false, names) => Clients::Named(names.to_vec()),
        };
        Ok(Some(TlsServer::from_files(files, clients)?))
    }

    /// The files of one side, if any were given.
    ///
    /// # Errors
    /// The directory is not laid out as it should be.
    pub fn files(&self, side: TlsSide) -> anyhow::Result<Option<TlsFiles>> {
        if let Some(directory) = &self.tls_dir {
            return Ok(Some(TlsFiles::in_directory(directory, side)?));
        }
        let files = TlsFiles {
            authorities: self.tls_ca.clone(),
            certificate: self.tls_cert.clone(),
            key: self.tls_key.clone(),
        };
        Ok((files != TlsFiles::default()).then_some(files))
    }

    /// The folders that the files are in: a renewed certificate is another file there.
    pub fn folders(&self) -> impl Iterator<Item = &Path> {
        let files = [&self.tls_ca, &self.tls_cert, &self.tls_key];
        let folders = files
            .into_iter()
            .flatten()
            .map(|path| crate::folder_of(path));
        folders.chain(self.tls_dir.as_deref())
    }

    /// Whether addresses may be used as they are: once there are certificates, clear text has to be asked for.
    ///
    /// # Errors
    /// The first that would be in clear text, with what to write.
    pub fn check_clear_text<'a>(
        &self,
        addresses: impl IntoIterator<Item = &'a Address>,
    ) -> anyhow::Result<()> {
        let is_given = self.tls_ca.is_some() || self.tls_cert.is_some() || self.tls_dir.is_some();
        if !is_given || self.clear_text {
            return Ok(());
        }
        let mut addresses = addresses.into_iter();
        let Some(address) = addresses.find(|address| crosses_a_network_in_the_clear(address))
        else {
            return Ok(());
        };
        let place = address.to_string();
        let place = place
            .split_once(':')
            .map_or(place.as_str(), |(_, place)| place);
        anyhow::bail!(
            "{address} is in clear text although certificates are given: write tls:{place}, or give --clear-text if that is meant"
        )
    }
}

/// The warning for addresses whose channels others on the network can read and change; empty if there are none.
#[must_use]
pub fn clear_text_warning<'a>(addresses: impl IntoIterator<Item = &'a Address>) -> String {
    let clear = addresses
        .into_iter()
        .filter(|address| crosses_a_network_in_the_clear(address));
    let clear: Vec<String> = clear.map(ToString::to_string).collect();
    if clear.is_empty() {
        return String::new();
    }
    format!(
        "clear text: whoever is on the way between the hosts can read and change the guest ({}); tls: addresses protect it",
        clear.join(", ")
    )
}

/// Not TLS, and not within this host.
fn crosses_a_network_in_the_clear(address: &Address) -> bool {
    match address {
        Address::Tcp(place) | Address::Rdma(place) => {
            let host = place.host();
            let ip = host.parse::<std::net::IpAddr>();
            !(host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback()))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        tls: TlsFlags,
    }

    fn check(flags: &[&str], addresses: &[&str]) -> Result<(), String> {
        let flags = Program::parse_from([&["program"], flags].concat()).tls;
        let addresses: Vec<Address> = addresses.iter().map(|text| text.parse().unwrap()).collect();
        flags
            .check_clear_text(&addresses)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn with_certificates_clear_text_has_to_be_asked_for() {
        let ca = ["--tls-ca", "ca.pem"];
        let error = check(&ca, &["tls:a:1", "tcp:10.0.0.1:4444"]).unwrap_err();
        assert_eq!(
            error,
            "tcp:10.0.0.1:4444 is in clear text although certificates are given: write tls:10.0.0.1:4444, or give \
             --clear-text if that is meant"
        );
        check(&["--tls-dir", "/pki"], &["rdma:host:1"]).unwrap_err();
        check(
            &["--tls-ca", "ca.pem", "--clear-text"],
            &["tcp:10.0.0.1:4444"],
        )
        .unwrap();
        check(
            &ca,
            &["tls:a:1", "unix:/a", "tcp:127.0.0.1:1", "tcp:[::1]:1"],
        )
        .unwrap();
        check(&[], &["tcp:10.0.0.1:4444"]).unwrap();
    }

    #[test]
    fn clear_text_is_announced_where_it_leaves_the_host() {
        let warning = |texts: &[&str]| {
            let addresses: Vec<Address> = texts.iter().map(|text| text.parse().unwrap()).collect();
            clear_text_warning(&addresses)
        };
        assert_eq!(warning(&["tls:a:1", "unix:/a", "tcp:127.0.0.1:1"]), "");
        assert_eq!(
            warning(&["tcp:0.0.0.0:4444", "tls:a:1"]),
            "clear text: whoever is on the way between the hosts can read and change the guest (tcp:0.0.0.0:4444); tls: \
             addresses protect it"
        );
    }
}
