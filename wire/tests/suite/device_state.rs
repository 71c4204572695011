//! The states of a device: the arc table, printed and pinned, and what follows from it.

use multifd_wire::device_state::ARCS;
use multifd_wire::frame::DeviceFlags;
use multifd_wire::{DeviceState, device_state::Needs};

const ALL: [DeviceFlags; 4] = [
    DeviceFlags::NONE,
    DeviceFlags::PRE_COPY,
    DeviceFlags::P2P,
    DeviceFlags::PRE_COPY.union(DeviceFlags::P2P),
];

/// State by state, what may be asked for, of which devices.
fn table() -> String {
    let mut out = String::new();
    for from in DeviceState::ALL {
        out += &format!("{from}\n");
        for to in DeviceState::ALL {
            let needs: Vec<&str> = ARCS
                .iter()
                .filter(|arc| arc.from == from && arc.to == to)
                .map(|arc| match arc.needs {
                    Needs::Nothing => "every device",
                    Needs::P2p => "with P2P",
                    Needs::NoP2p => "without P2P",
                    Needs::PreCopy => "with pre-copy",
                    Needs::PreCopyAndP2p => "with pre-copy and P2P",
                    Needs::PreCopyNoP2p => "with pre-copy, without P2P",
                })
                .collect();
            if from == to {
                out += &format!("    go {to}: is there\n");
            } else if needs.is_empty() {
                out += &format!("    go {to}: refused\n");
            } else {
                out += &format!("    go {to}: {}\n", needs.join("; "));
            }
        }
        let reset = if from == DeviceState::Error {
            "running, state lost"
        } else {
            "not needed"
        };
        out += &format!("    fails: error\n    reset: {reset}\n");
    }
    out
}

#[test]
#[allow(clippy::print_stdout)] // printing it is half of what this test is for
fn the_table_of_states_and_requests() {
    let table = table();
    println!("{table}");
    assert_eq!(table, include_str!("device_state.txt"));
}

#[test]
fn nothing_leads_into_or_out_of_error() {
    for flags in ALL {
        for state in DeviceState::ALL {
            assert!(!state.may_become(DeviceState::Error, flags));
            assert!(!DeviceState::Error.may_become(state, flags));
        }
    }
}

#[test]
fn with_p2p_no_step_leads_between_working_freely_and_standing_still() {
    for flags in ALL
        .into_iter()
        .filter(|flags| flags.contains(DeviceFlags::P2P))
    {
        for from in DeviceState::ALL {
            for to in DeviceState::ALL {
                let crosses = (!from.is_quiescent() && !to.is_running())
                    || (!from.is_running() && !to.is_quiescent());
                assert!(!crosses || !from.may_become(to, flags), "{from} to {to}");
            }
        }
    }
}

#[test]
fn every_device_gets_from_every_state_to_running_to_stop_copy_and_to_resuming_step_by_step() {
    for flags in ALL {
        for from in DeviceState::ALL
            .into_iter()
            .filter(|state| *state != DeviceState::Error)
        {
            let pre_copy = matches!(from, DeviceState::PreCopy | DeviceState::PreCopyP2p);
            let p2p = matches!(from, DeviceState::RunningP2p | DeviceState::PreCopyP2p);
            if pre_copy && !flags.contains(DeviceFlags::PRE_COPY)
                || p2p && !flags.contains(DeviceFlags::P2P)
            {
                continue;
            }
            for to in [
                DeviceState::Running,
                DeviceState::StopCopy,
                DeviceState::Resuming,
            ] {
                let (mut state, mut steps) = (from, 0);
                while let Some(next) = state.step_to(to, flags) {
                    assert!(state.may_become(next, flags), "{state} to {next}");
                    (state, steps) = (next, steps + 1);
                    assert!(steps <= 5, "{from} to {to} with {flags:?}");
                }
                assert_eq!(state, to, "{from} to {to} with {flags:?}");
            }
        }
    }
}

#[test]
fn there_is_no_way_out_of_error_nor_into_a_state_that_the_device_lacks() {
    assert_eq!(
        DeviceState::Error.step_to(DeviceState::Running, ALL[3]),
        None
    );
    assert_eq!(
        DeviceState::Running.step_to(DeviceState::RunningP2p, DeviceFlags::PRE_COPY),
        None
    );
    assert_eq!(
        DeviceState::Running.step_to(DeviceState::PreCopy, DeviceFlags::P2P),
        None
    );
}
