//! Judges octets line by line, for a comparison with another implementation: a line of standard input is a structure (`hello`,
//! `hello_reply`, `frame` or `stream`) and the octets in hexadecimal; a line of standard output is `accept`, or the error's stable code.
//!
//! `cargo run -p multifd-wire --features exercise --example judge < mutants`

use std::io::{BufRead, Write};

use multifd_wire::exercise::check;
use multifd_wire::{Hello, HelloReply, Sequence};

fn main() -> std::io::Result<()> {
    let (input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    for line in input.lines() {
        let line = line?;
        let (structure, hex) = line.split_once(' ').unwrap_or((&line, ""));
        writeln!(output, "{}", judge(structure, &octets(hex)))?;
    }
    Ok(())
}

fn octets(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks_exact(2);
    let octet = |pair: &[u8]| {
        std::str::from_utf8(pair)
            .ok()
            .and_then(|pair| u8::from_str_radix(pair, 16).ok())
    };
    digits.map_while(octet).collect()
}

fn judge(structure: &str, octets: &[u8]) -> &'static str {
    match structure {
        "hello" => match octets.try_into().map(Hello::decode) {
            Ok(result) => result.err().map_or("accept", |error| error.code()),
            Err(_) => "cut",
        },
        "hello_reply" => match octets.try_into().map(HelloReply::decode) {
            Ok(result) => result.err().map_or("accept", |error| error.code()),
            Err(_) => "cut",
        },
        "frame" => match check(octets) {
            Ok(Some((_, _, []))) => "accept",
            Ok(Some(_)) => "more",
            Ok(None) => "cut",
            Err(error) => error.code(),
        },
        "stream" => stream(octets),
        _ => "unknown structure",
    }
}

fn stream(mut octets: &[u8]) -> &'static str {
    let mut due = Sequence::FIRST;
    while !octets.is_empty() {
        let header = match check(octets) {
            Ok(Some((header, _, rest))) => {
                octets = rest;
                header
            }
            Ok(None) => return "cut",
            Err(error) => return error.code(),
        };
        if let Err(error) = header.check_sequence(due) {
            return error.code();
        }
        due = due.next();
    }
    "accept"
}
