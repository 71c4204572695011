//! The assembler: what it refuses, what it holds, and that every interleaving of lanes gives the stream that was cut.

use proptest::prelude::*;

use super::*;

const WINDOW: u64 = 64 << 10;

fn assembler() -> Assembler {
    Assembler::new(DeviceId::new(3), 8192, WINDOW)
}

fn chunk(index: u64, offset: u64) -> DeviceChunk {
    DeviceChunk {
        device: DeviceId::new(3),
        section: Section::Data,
        index,
        offset,
    }
}

fn mark(mark: Mark, generation: u32, index: u64, offset: u64) -> DeviceMark {
    DeviceMark {
        device: DeviceId::new(3),
        mark,
        generation: Generation::new(generation),
        index,
        offset,
    }
}

fn bring(a: &mut Assembler, index: u64, offset: u64, octets: &[u8]) {
    let admit = a
        .admit(&chunk(index, offset), octets.len() as u64, 0)
        .unwrap();
    assert_eq!(admit, Admit::Take);
    a.arrived(index, octets.to_vec()).unwrap();
}

fn is_misfit(result: Result<Admit, Fault>) -> bool {
    matches!(
        result,
        Err(Fault::Misbehaved(Misbehaved::DeviceStream {
            device: 3,
            ..
        }))
    )
}

#[test]
fn hands_over_in_order_whatever_came_first() {
    let mut a = assembler();
    bring(&mut a, 1, 2, b"cd");
    assert_eq!(a.pop(), None);
    a.mark(&mark(Mark::DataEnd, 0, 2, 4)).unwrap();
    bring(&mut a, 0, 0, b"ab");
    assert_eq!(a.pop(), Some(Item::Data(b"ab".to_vec())));
    assert_eq!(a.pop(), Some(Item::Data(b"cd".to_vec())));
    assert_eq!(a.pop(), Some(Item::DataEnd));
    assert_eq!(a.pop(), None);
    a.mark(&mark(Mark::ConfigEnd, 0, 3, 4)).unwrap();
    assert_eq!(a.pop(), Some(Item::ConfigEnd));
    assert!(a.is_over());
}

#[test]
fn drops_what_it_has_and_takes_again_what_was_given_up() {
    let mut a = assembler();
    bring(&mut a, 0, 0, b"ab");
    bring(&mut a, 2, 4, b"ef");
    a.lane_lost();
    assert_eq!(a.admit(&chunk(0, 0), 2, 0).unwrap(), Admit::Have);
    assert_eq!(a.admit(&chunk(2, 4), 2, 0).unwrap(), Admit::Have);
    assert_eq!(a.admit(&chunk(1, 2), 2, 0).unwrap(), Admit::Take);
    assert!(
        is_misfit(a.admit(&chunk(1, 2), 2, 0)),
        "on two lanes at once"
    );
    a.give_up(1);
    bring(&mut a, 1, 2, b"cd");
    a.give_up(1);
    assert_eq!(a.pop(), Some(Item::Data(b"ab".to_vec())));
    assert_eq!(a.pop(), Some(Item::Data(b"cd".to_vec())));
    assert_eq!(a.pop(), Some(Item::Data(b"ef".to_vec())));
}

#[test]
fn an_item_comes_again_only_after_a_lane_was_lost_and_as_it_was() {
    let mut a = assembler();
    bring(&mut a, 0, 0, b"ab");
    bring(&mut a, 2, 4, b"ef");
    for index in [0, 2] {
        let again = a.admit(&chunk(index, index * 2), 2, 0);
        assert!(is_misfit(again), "no lane was lost");
    }
    a.lane_lost();
    assert!(is_misfit(a.admit(&chunk(0, 0), 3, 0)), "longer than it was");
    assert!(is_misfit(a.admit(&chunk(2, 4), 2, 9)), "other bytes");
    assert!(is_misfit(a.admit(&chunk(2, 4), 1, 0)), "shorter");
    let config = DeviceChunk {
        section: Section::Config,
        ..chunk(2, 4)
    };
    assert!(is_misfit(a.admit(&config, 2, 0)), "of another section");
    let instead = a.mark(&mark(Mark::DataEnd, 0, 2, 4));
    assert!(instead.is_err(), "a mark in a chunk's place");
    // Three indices were seen: so often may items come again.
    for _ in 0..3 {
        assert_eq!(a.admit(&chunk(2, 4), 2, 0).unwrap(), Admit::Have);
    }
    assert!(is_misfit(a.admit(&chunk(2, 4), 2, 0)), "once too often");
    a.lane_lost();
    bring(&mut a, 1, 2, b"cd");
    bring(&mut a, 3, 6, b"gh");
    assert_eq!(a.admit(&chunk(1, 2), 2, 0).unwrap(), Admit::Have);
    assert!(
        is_misfit(a.admit(&chunk(3, 6), 2, 0)),
        "it came after the loss"
    );
}

#[test]
fn takes_up_to_the_granted_octet_and_not_one_more() {
    let mut a = assembler();
    assert!(matches!(
        a.admit(&chunk(9, WINDOW - 8191), 8192, 0),
        Err(Fault::Misbehaved(Misbehaved::Credit { end, offset_max: WINDOW, .. })) if end == WINDOW + 1
    ));
    assert_eq!(
        a.admit(&chunk(9, WINDOW - 8192), 8192, 0).unwrap(),
        Admit::Take
    );
    assert!(a.admit(&chunk(10, u64::MAX), 1, 0).is_err());
    assert!(
        is_misfit(a.admit(&chunk(1, 0), 8193, 0)),
        "longer than its chunks are"
    );
    assert!(is_misfit(a.admit(&chunk(1, 0), 0, 0)));
}

#[test]
fn refuses_offsets_with_a_gap_or_an_overlap() {
    let mut a = assembler();
    assert!(
        is_misfit(a.admit(&chunk(0, 1), 5, 0)),
        "the first begins at 0"
    );
    bring(&mut a, 0, 0, &[0; 10]);
    assert!(is_misfit(a.admit(&chunk(1, 9), 5, 0)));
    assert!(is_misfit(a.admit(&chunk(1, 11), 5, 0)));
    bring(&mut a, 5, 100, &[0; 10]);
    assert!(is_misfit(a.admit(&chunk(6, 109), 5, 0)));
    assert!(is_misfit(a.admit(&chunk(6, 111), 5, 0)));
    assert!(is_misfit(a.admit(&chunk(4, 99), 2, 0)));
    assert!(
        is_misfit(a.admit(&chunk(4, 98), 1, 0)),
        "a gap below a held item"
    );
    assert!(
        is_misfit(a.admit(&chunk(3, 95), 6, 0)),
        "across a held item"
    );
    assert!(
        is_misfit(a.admit(&chunk(7, 105), 2, 0)),
        "inside a held item"
    );
    assert!(
        is_misfit(a.admit(&chunk(3, 5), 2, 0)),
        "inside what came already"
    );
    assert_eq!(a.admit(&chunk(4, 99), 1, 0).unwrap(), Admit::Take);
    assert!(is_misfit(a.admit(&chunk(u64::MAX, 500), 1, 0)));
}

#[test]
fn refuses_what_is_no_stream() {
    let refuses = |marks: &[(Mark, u32)], config_first: bool| {
        let mut a = assembler();
        let mut index = 0;
        if config_first {
            let config = DeviceChunk {
                section: Section::Config,
                ..chunk(0, 0)
            };
            a.admit(&config, 4, 0).unwrap();
            return a.arrived(0, vec![0; 4]).is_err();
        }
        marks.iter().any(|(what, generation)| {
            index += 1;
            a.mark(&mark(*what, *generation, index - 1, 0)).is_err()
        })
    };
    assert!(
        refuses(&[], true),
        "configuration before the end of the data"
    );
    for marks in [
        &[(Mark::InitialEnd, 2)][..],
        &[(Mark::InitialEnd, 1), (Mark::InitialEnd, 1)],
        &[(Mark::DataEnd, 1)],
        &[(Mark::DataEnd, 0), (Mark::DataEnd, 0)],
        &[(Mark::DataEnd, 0), (Mark::InitialEnd, 1)],
        &[(Mark::ConfigEnd, 0)],
        &[
            (Mark::DataEnd, 0),
            (Mark::ConfigEnd, 0),
            (Mark::ConfigEnd, 0),
        ],
        &[(Mark::Restart, 1)],
    ] {
        assert!(refuses(marks, false), "{marks:?}");
    }
    let good = [
        (Mark::InitialEnd, 1),
        (Mark::InitialEnd, 2),
        (Mark::DataEnd, 2),
        (Mark::Restart, 2),
        (Mark::DataEnd, 2),
        (Mark::ConfigEnd, 2),
        (Mark::Restart, 2),
        (Mark::InitialEnd, 3),
    ];
    assert!(!refuses(&good, false));
}

#[test]
fn a_stream_that_is_complete_for_a_switchover_that_is_void_is_complete_only_after_it_began_anew() {
    let mark = |index, mark| DeviceMark {
        device: DeviceId::new(0),
        mark,
        generation: Generation::new(0),
        index,
        offset: 0,
    };
    let mut a = assembler();
    a.mark(&mark(0, Mark::DataEnd)).unwrap();
    // Not complete: nothing of it is void yet.
    a.break_off();
    assert_eq!(a.mark(&mark(1, Mark::ConfigEnd)).unwrap(), Came::All);
    assert!(a.is_over());
    a.break_off();
    assert!(!a.is_over(), "SPEC: RESUME-8");
    // The lane with the RESTART is slow, or lost.
    a.mark(&mark(3, Mark::DataEnd)).unwrap();
    a.mark(&mark(4, Mark::ConfigEnd)).unwrap();
    assert!(!a.is_over());
    assert_eq!(a.missing(), 2);
    assert_eq!(a.mark(&mark(2, Mark::Restart)).unwrap(), Came::All);
    assert!(a.is_over());
}

#[test]
fn too_many_small_items_are_a_matter_of_limits() {
    let mut a = assembler();
    let most = WINDOW / 4096 + ITEMS_SPARE;
    for index in 0..most {
        bring(&mut a, index + 1, index + 1, &[0]);
    }
    let error = a.admit(&chunk(most + 1, most + 1), 1, 0).unwrap_err();
    assert!(matches!(error, Fault::Limit { .. }), "{error}");
    // The lowest missing one is refused as well: the limit is the end of the session, not a pause.
    assert!(a.admit(&chunk(0, 0), 1, 0).is_err());
}

#[test]
fn tells_credit_a_quarter_at_a_time_and_at_once_when_the_next_chunk_may_not_fit() {
    let mut a = Assembler::new(DeviceId::new(0), 60_000, WINDOW);
    bring(&mut a, 0, 0, &[0; 5000]);
    a.pop();
    a.loaded(5000);
    assert_eq!(
        a.credit(),
        None,
        "less than a quarter, and a whole chunk still fits"
    );
    bring(&mut a, 1, 5000, &[0; 600]);
    a.pop();
    a.loaded(600);
    assert_eq!(a.credit(), Some(WINDOW + 5600), "60,000 no longer fit");
    bring(&mut a, 2, 5600, &[0; 20_000]);
    a.pop();
    assert_eq!(a.credit(), None, "nothing was loaded");
    a.loaded(20_000);
    assert_eq!(a.credit(), Some(WINDOW + 25_600));
    assert_eq!(a.credit(), None, "told already");
}

/// One item of a stream, as a source cuts it.
#[derive(Debug, Clone)]
enum Cut {
    Chunk(DeviceChunk, Vec<u8>),
    Mark(DeviceMark),
}

/// Cuts a stream of data pieces (0: an INITIAL_END) and a configuration.
fn cut(pieces: &[usize], config: usize) -> (Vec<Cut>, Vec<u8>) {
    let (mut items, mut whole, mut generation) = (Vec::new(), Vec::new(), 0);
    let add = |section, bytes: usize, whole: &mut Vec<u8>, items: &mut Vec<Cut>| {
        let (index, offset) = (items.len() as u64, whole.len() as u64);
        let octets: Vec<u8> = (0..bytes).map(|i| (i as u64 + index * 31) as u8).collect();
        whole.extend_from_slice(&octets);
        let head = DeviceChunk {
            section,
            ..chunk(index, offset)
        };
        items.push(Cut::Chunk(head, octets));
    };
    for piece in pieces {
        if *piece == 0 {
            generation += 1;
            let at = (items.len() as u64, whole.len() as u64);
            items.push(Cut::Mark(mark(Mark::InitialEnd, generation, at.0, at.1)));
        } else {
            add(Section::Data, *piece, &mut whole, &mut items);
        }
    }
    let at = (items.len() as u64, whole.len() as u64);
    items.push(Cut::Mark(mark(Mark::DataEnd, generation, at.0, at.1)));
    if config > 0 {
        add(Section::Config, config, &mut whole, &mut items);
    }
    let at = (items.len() as u64, whole.len() as u64);
    items.push(Cut::Mark(mark(Mark::ConfigEnd, generation, at.0, at.1)));
    (items, whole)
}

/// A lane with items on the way, of which the first may be half read, and items that arrived and are not acknowledged.
#[derive(Default)]
struct Way {
    items: std::collections::VecDeque<Cut>,
    unacked: Vec<Cut>,
    reading: bool,
}

proptest! {
    /// Whatever lanes carry the items, in whatever order they are read, with lanes dying in the middle and their items
    /// sent again, the loader gets the stream that was cut, and never more than the window is held.
    #[test]
    fn every_interleaving_of_lanes_gives_the_stream_that_was_cut(
        pieces in proptest::collection::vec(0usize..5000, 1..60),
        config in 0usize..3000,
        steps in proptest::collection::vec((0usize..4, 0u8..9), 200..2000),
    ) {
        const SMALL: u64 = 12_000;
        let (items, whole) = cut(&pieces, config);
        let mut a = Assembler::new(DeviceId::new(3), 8192, SMALL);
        let mut to_send: std::collections::VecDeque<Cut> = items.iter().cloned().collect();
        let mut ways: Vec<Way> = (0..4).map(|_| Way::default()).collect();
        let (mut got, mut granted, mut marks) = (Vec::new(), SMALL, 0);
        let mut random = steps.into_iter().chain(std::iter::repeat_with({
            let mut n = 0usize;
            move || { n += 1; (n % 4, (n / 4 % 7) as u8) }
        }));
        for _ in 0..1_000_000 {
            if a.is_over() && a.held_bytes() == 0 { break }
            let (lane, action) = random.next().unwrap();
            let way = &mut ways[lane];
            match action {
                // The source sends its next item on this lane, within its credit.
                0..=2 => {
                    let fits = match to_send.front() {
                        Some(Cut::Chunk(head, octets)) => head.offset + octets.len() as u64 <= granted,
                        Some(Cut::Mark(_)) => true,
                        None => false,
                    };
                    if fits { way.items.push_back(to_send.pop_front().unwrap()); }
                }
                // The lane reads: a head, then the body.
                3 | 4 => match way.items.front().cloned() {
                    Some(Cut::Chunk(head, octets)) if way.reading => {
                        a.arrived(head.index, octets).unwrap();
                        way.reading = false;
                        way.unacked.extend(way.items.pop_front());
                    }
                    Some(Cut::Chunk(head, octets)) => match a.admit(&head, octets.len() as u64, 0).unwrap() {
                        Admit::Take => way.reading = true,
                        Admit::Have => way.unacked.extend(way.items.pop_front()),
                    },
                    Some(Cut::Mark(mark)) => { a.mark(&mark).unwrap(); way.unacked.extend(way.items.pop_front()); }
                    None => {}
                },
                // The loader.
                5 | 6 => {
                    match a.pop() {
                        Some(Item::Data(octets) | Item::Config(octets)) => {
                            a.loaded(octets.len() as u64);
                            got.extend(octets);
                        }
                        Some(_) => marks += 1,
                        None => {}
                    }
                    granted = a.credit().unwrap_or(granted);
                }
                // What arrived on the lane is acknowledged.
                7 => way.unacked.clear(),
                // The lane dies; everything that it did not have acknowledged is sent again, the oldest first.
                _ => {
                    if way.reading && let Some(Cut::Chunk(head, _)) = way.items.front() { a.give_up(head.index); }
                    way.reading = false;
                    a.lane_lost();
                    let lost = std::mem::take(&mut way.unacked).into_iter().chain(std::mem::take(&mut way.items));
                    for item in lost.collect::<Vec<_>>().into_iter().rev() { to_send.push_front(item); }
                }
            }
            prop_assert!(a.held_bytes() <= SMALL, "{} bytes held", a.held_bytes());
        }
        while let Some(item) = a.pop() {
            marks += usize::from(!matches!(item, Item::Data(_) | Item::Config(_)));
        }
        prop_assert!(a.is_over(), "it never came to its end");
        prop_assert_eq!(marks, items.iter().filter(|item| matches!(item, Cut::Mark(_))).count());
        prop_assert_eq!(got, whole);
    }
}
