//! The table of states, frames and events, as it was agreed on.

use std::collections::BTreeMap;

use super::steps::{all_steps, feed, state_after, states, word};
use super::*;

fn state_name(session: &Session) -> String {
    let phase = match &session.state {
        State::Setup => format!(
            "set-up ({} tables{}{})",
            session.set_up.tables(),
            if session.set_up.has_machine() {
                ", machine"
            } else {
                ""
            },
            if session.resumed { ", resumed" } else { "" },
        ),
        State::Rounds if session.rounds.is_closing() => {
            format!("round {}, closing", session.round())
        }
        State::Rounds => format!("round {}", session.round()),
        State::Fenced(fence) if fence.short_since().is_some() => {
            format!("fenced {}, pages missing", fence.round)
        }
        State::Fenced(fence) => format!("fenced {}", fence.round),
        State::Loading(loading) => format!(
            "loading ({}{})",
            if loading.is_loaded() {
                "state loaded"
            } else {
                "state"
            },
            if session.devices.all_loaded() {
                ""
            } else {
                ", devices"
            },
        ),
        State::Prepared(_) => "prepared".into(),
        State::Suspended { .. } if session.secrets.is_some() => "settling".into(),
        State::Suspended { .. } => "suspended".into(),
        State::Owning { .. } => "owning".into(),
        State::Over => return "over".into(),
    };
    let lanes = session.lanes.in_words();
    if lanes.is_empty() {
        phase
    } else {
        format!("{phase} [{lanes}]")
    }
}

/// The table: for each state the steps, those with the same meaning together.
fn table() -> String {
    let mut out = String::new();
    for (state, _) in states() {
        out.push_str(&format!("{state}: {}\n", state_name(&state_after(state))));
        let mut same: BTreeMap<String, Vec<&str>> = BTreeMap::new();
        let mut order = Vec::new();
        for (name, step, at) in all_steps() {
            let mut session = state_after(state);
            let before = state_name(&session);
            let words: Vec<String> = feed(&mut session, step, at).iter().map(word).collect();
            let now = state_name(&session);
            let mut text = words.join("; ");
            if now != before {
                text = format!("{text} -> {now}").trim_start().to_owned();
            }
            if text.is_empty() {
                text.push_str("no effect");
            }
            if !same.contains_key(&text) {
                order.push(text.clone());
            }
            same.entry(text).or_default().push(name);
        }
        for text in order {
            let steps = same[&text].join(" | ");
            out.push_str(&format!("    {steps}\n        {text}\n"));
        }
    }
    out
}

#[test]
#[allow(clippy::print_stdout)] // To be read: this is the machine.
fn the_table_of_states_frames_and_events() {
    let table = table();
    println!("{table}");
    assert_eq!(
        table,
        include_str!("../table.txt"),
        "table.txt is what was agreed on; if the machine was changed on purpose, it changes in the same commit"
    );
}
