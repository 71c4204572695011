//! Listening by TCP, and by TLS above it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use socket2::{SockAddr, Socket};

use super::{OptionRefused, TcpOptions, print, socket};
use crate::accept;
use crate::address::{Address, HostPort};
use crate::adopt::Protection;
use crate::channel::Channel;
use crate::error::{ConnectError, ListenError};
use crate::listener::{Accepted, BACKLOG, Listen, RESOLVE_MAX};
use crate::options::ChannelOptions;

/// A listening socket.
pub(crate) struct TcpListening {
    socket: Socket,
    protection: Protection,
    options: ChannelOptions,
    address: Address,
}

impl TcpListening {
    /// Listens at the first address of the host that can be bound; `address` is `target` with its kind.
    pub(crate) fn bind(
        target: &HostPort,
        address: &Address,
        options: &ChannelOptions,
    ) -> Result<Self, ListenError> {
        let failed = |cause| ListenError::Bind {
            address: address.to_string(),
            cause,
        };
        let socket = bind(target, address, options)?;
        let protection = match address {
            Address::Tls(_) => Protection::Tls,
            _ => Protection::Plain,
        };
        Self::over(socket, protection, options).map_err(failed)
    }

    /// Accepts on a socket that listens already.
    pub(crate) fn over(
        socket: Socket,
        protection: Protection,
        options: &ChannelOptions,
    ) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let bound = socket.local_addr()?.as_socket();
        let bound = bound.ok_or(io::Error::from(io::ErrorKind::AddrNotAvailable))?;
        let address = match (protection, Address::from(bound)) {
            (Protection::Tls, Address::Tcp(bound)) => Address::Tls(bound),
            (_, address) => address,
        };
        Ok(Self {
            socket,
            protection,
            options: options.clone(),
            address,
        })
    }

    fn channel(&self, socket: Socket) -> io::Result<Box<dyn Channel>> {
        match (self.protection, self.options.clone()) {
            #[cfg(feature = "tls")]
            (
                Protection::Tls,
                ChannelOptions {
                    tls_server: Some(server),
                    ..
                },
            ) => {
                let name = super::name("tls", &socket)?;
                crate::tls::accepted(socket, &name, &server)
            }
            (Protection::Tls, _) => Err(io::Error::other("no certificate to accept TLS with")),
            (Protection::Plain, _) => super::channel(socket),
        }
    }

    fn accepted(&self, socket: Socket, peer: &SockAddr) -> Result<Option<Accepted>, ListenError> {
        let peer = print(peer);
        let options: &TcpOptions = &self.options.tcp;
        options
            .apply(&socket)
            .and_then(|()| options.fit(&socket))
            .map_err(|refused| option_error(refused, &peer))?;
        match self.channel(socket) {
            Ok(channel) => Ok(Some((channel, peer))),
            // Reset between being accepted and being asked for its address: as if it had died in the queue.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(None),
            Err(error) => Err(ListenError::Io(error)),
        }
    }
}

impl Listen for TcpListening {
    fn try_accept(&self) -> Result<Option<Accepted>, ListenError> {
        while let Some((socket, peer)) = accept::next(&self.socket)? {
            if let Some(accepted) = self.accepted(socket, &peer)? {
                return Ok(Some(accepted));
            }
        }
        Ok(None)
    }

    fn local_address(&self) -> &Address {
        &self.address
    }

    fn poll_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn shutdown(&self) {
        accept::shutdown(&self.socket);
    }
}

fn bind(
    target: &HostPort,
    address: &Address,
    options: &ChannelOptions,
) -> Result<Socket, ListenError> {
    let failed = |cause| ListenError::Bind {
        address: address.to_string(),
        cause,
    };
    let addresses = options
        .resolver
        .resolve(target, Instant::now() + RESOLVE_MAX)
        .map_err(|error| match error {
            ConnectError::Resolve { cause, .. } => failed(cause),
            other => failed(io::Error::other(other)),
        })?;
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for candidate in addresses {
        let socket = socket(candidate).map_err(failed)?;
        options
            .tcp
            .apply(&socket)
            .map_err(|refused| option_error(refused, "anybody"))?;
        // A new listener must not wait for the last minute's connections of the old one to be forgotten.
        socket.set_reuse_address(true).map_err(failed)?;
        match socket
            .bind(&candidate.into())
            .and_then(|()| socket.listen(BACKLOG))
        {
            Ok(()) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

fn option_error(refused: OptionRefused, peer: &str) -> ListenError {
    ListenError::Option {
        peer: peer.to_owned(),
        option: refused.option,
        cause: refused.source,
    }
}
