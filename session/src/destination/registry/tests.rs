use multifd_wire::{Features, LaneId};

use super::*;

const SESSION: SessionId = SessionId::new([7; 16]);

/// Tokens that count up from 1.
fn draws() -> impl FnMut() -> Option<Token> {
    let mut next = 0;
    move || {
        next += 1;
        Some(Token::new([next; 16]))
    }
}

fn config() -> super::super::ConfigBuilder {
    Config::builder().lanes_max(2)
}

fn registry() -> Registry {
    Registry::new(&config().build().unwrap())
}

fn start() -> Hello {
    Hello::start(SESSION, Features::NONE, Features::RESUME)
}

fn begun(registry: &mut Registry) -> Granted {
    match registry.hello(&start(), draws()) {
        Verdict::Start(HelloReply::Accepted { .. }, granted) => granted,
        other => panic!("{other:?}"),
    }
}

fn join(ticket: Token, lane: u32, incarnation: u32) -> Hello {
    let (lane, incarnation) = (LaneId::new(lane), Incarnation::new(incarnation));
    Hello::join(SESSION, ticket, Features::RESUME, lane, incarnation)
}

/// The reason of a refusal that is answered at once.
fn refused(registry: &mut Registry, hello: &Hello) -> Reason {
    match registry.hello(hello, draws()) {
        Verdict::Refuse(HelloReply::Refused { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

/// How long a refusal of a wrong token is kept back.
fn kept_back(registry: &mut Registry, hello: &Hello) -> Option<Duration> {
    match registry.hello(hello, draws()) {
        Verdict::WrongToken(HelloReply::Refused { reason, .. }, pause) => {
            assert_eq!(reason, Reason::BadTicket);
            pause
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_second_session_is_told_that_this_one_is_busy_until_it_is_over() {
    let mut registry = registry();
    let granted = begun(&mut registry);
    assert_ne!(granted.ticket, granted.resume_secret);
    assert!(!registry.is_free());
    assert_eq!(refused(&mut registry, &start()), Reason::Busy);
    registry.clear();
    assert!(registry.is_free());
    begun(&mut registry);
}

#[test]
fn no_session_begins_without_random_numbers() {
    let mut registry = registry();
    let verdict = registry.hello(&start(), || None);
    assert!(
        matches!(verdict, Verdict::Refuse(HelloReply::Refused { reason, .. }) if reason == Reason::Internal),
        "{verdict:?}"
    );
    assert!(registry.is_free());
}

// SPEC: JOIN-1, JOIN-3
#[test]
fn a_lane_joins_once_in_each_incarnation_and_they_rise() {
    let mut registry = registry();
    let ticket = begun(&mut registry).ticket;
    let may = |registry: &mut Registry, lane, incarnation| {
        let hello = join(ticket, lane, incarnation);
        matches!(registry.hello(&hello, draws()), Verdict::Join(_))
    };
    assert!(may(&mut registry, 0, 0));
    let again = join(ticket, 0, 0);
    assert_eq!(refused(&mut registry, &again), Reason::Misbehaved);
    assert!(may(&mut registry, 0, 3));
    let back = join(ticket, 0, 2);
    assert_eq!(refused(&mut registry, &back), Reason::Misbehaved);
    let never = join(ticket, 1, 1);
    assert_eq!(refused(&mut registry, &never), Reason::Misbehaved);
    let beyond = join(ticket, 2, 0);
    assert_eq!(refused(&mut registry, &beyond), Reason::TooManyLanes);
}

#[test]
fn a_channel_of_another_session_is_no_lane_of_this_one() {
    let mut registry = registry();
    let ticket = begun(&mut registry).ticket;
    let theirs = Hello {
        session: SessionId::new([8; 16]),
        ..join(ticket, 0, 0)
    };
    assert_eq!(refused(&mut registry, &theirs), Reason::WrongSession);
    registry.clear();
    let late = join(ticket, 0, 0);
    let reason = refused(&mut registry, &late);
    assert_eq!(reason, Reason::WrongSession);
}

// SPEC: GRANT-1, RESUME-13
#[test]
fn a_resume_makes_a_new_ticket_and_a_lane_may_join_that_was_never_here() {
    let mut registry = registry();
    let before = begun(&mut registry);
    let resume = Hello::resume(SESSION, before.resume_secret, Features::RESUME);
    let mut draw = draws();
    let (_, _) = (draw(), draw());
    let after = match registry.hello(&resume, draw) {
        Verdict::Resume(_, granted) => granted,
        other => panic!("{other:?}"),
    };
    assert_eq!(after.resume_secret, before.resume_secret);
    assert_ne!(after.ticket, before.ticket);
    assert!(kept_back(&mut registry, &join(before.ticket, 1, 1)).is_some());
    let verdict = registry.hello(&join(after.ticket, 1, 1), draws());
    assert!(matches!(verdict, Verdict::Join(_)), "{verdict:?}");
}

// SPEC: RESUME-1, ASK-1
#[test]
fn only_the_secret_of_the_session_that_is_here_resumes_it_or_asks_for_it() {
    let mut registry = registry();
    let secret = Token::new([2; 16]);
    let hellos = |secret| {
        [
            Hello::resume(SESSION, secret, Features::RESUME),
            Hello::ask(SESSION, secret),
        ]
    };
    for hello in hellos(secret) {
        assert_eq!(refused(&mut registry, &hello), Reason::WrongSession);
    }
    let granted = begun(&mut registry);
    assert_eq!(granted.resume_secret, secret);
    for hello in hellos(granted.ticket) {
        assert!(kept_back(&mut registry, &hello).is_some());
    }
    let [resume, ask] = hellos(secret);
    let verdict = registry.hello(&ask, draws());
    assert!(matches!(verdict, Verdict::Ask(_)), "{verdict:?}");
    let verdict = registry.hello(&resume, draws());
    assert!(matches!(verdict, Verdict::Resume(..)), "{verdict:?}");
}

// SPEC: RESUME-1
#[test]
fn a_session_that_is_not_kept_is_not_resumed() {
    let mut registry = Registry::new(&config().suspend(Duration::ZERO).build().unwrap());
    let granted = begun(&mut registry);
    assert_eq!(granted.features, Features::NONE);
    let resume = Hello::resume(SESSION, granted.resume_secret, Features::NONE);
    let reason = refused(&mut registry, &resume);
    assert_eq!(reason, Reason::Feature);
}

// SPEC: SEC-6
#[test]
fn each_wrong_token_waits_twice_as_long_as_the_one_before_until_a_right_one_comes() {
    let mut registry = registry();
    let granted = begun(&mut registry);
    let wrong = join(granted.resume_secret, 0, 0);
    let pauses: Vec<_> = (0..8)
        .map(|_| {
            let pause = kept_back(&mut registry, &wrong).expect("an answer");
            registry.answered_late();
            pause.as_millis()
        })
        .collect();
    assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
    let ask = Hello::ask(SESSION, granted.resume_secret);
    let verdict = registry.hello(&ask, draws());
    assert!(matches!(verdict, Verdict::Ask(_)), "{verdict:?}");
    let first = Duration::from_millis(50);
    assert_eq!(kept_back(&mut registry, &wrong), Some(first));
}

// SPEC: SEC-6
#[test]
fn only_so_many_wrong_tokens_wait_for_an_answer() {
    let mut registry = registry();
    let granted = begun(&mut registry);
    let wrong = join(granted.resume_secret, 0, 0);
    for _ in 0..WRONG_TOKENS_AT_ONCE {
        assert!(kept_back(&mut registry, &wrong).is_some());
    }
    assert_eq!(kept_back(&mut registry, &wrong), None);
    // Whoever has the right one is not kept waiting by those who have not.
    let verdict = registry.hello(&join(granted.ticket, 0, 0), draws());
    assert!(matches!(verdict, Verdict::Join(_)), "{verdict:?}");
    registry.answered_late();
    assert!(kept_back(&mut registry, &wrong).is_some());
    assert_eq!(kept_back(&mut registry, &wrong), None);
}

// SPEC: SEC-7
#[test]
fn only_a_source_with_the_pass_begins() {
    let pass = Token::new([9; 16]);
    let mut registry = Registry::new(&config().pass(pass).build().unwrap());
    assert!(kept_back(&mut registry, &start()).is_some());
    let other = start().with_pass(Token::new([1; 16]));
    assert!(kept_back(&mut registry, &other).is_some());
    let verdict = registry.hello(&start().with_pass(pass), draws());
    assert!(matches!(verdict, Verdict::Start(..)), "{verdict:?}");
}

// SPEC: SEC-8
#[test]
fn a_session_that_gives_way_is_asked_to_once_and_nobody_begins_before_it_is_gone() {
    let mut registry = registry();
    let granted = begun(&mut registry);
    registry.set_yields(true);
    // Another that may not begin does not drive it away.
    let unknown = Hello {
        features_mandatory: Features::BRIDGE,
        ..start()
    };
    assert_eq!(refused(&mut registry, &unknown), Reason::Feature);
    assert_eq!(registry.hello(&start(), draws()), Verdict::GiveWay);
    assert_eq!(refused(&mut registry, &start()), Reason::Busy);
    // Its own source may still come back.
    registry.set_yields(true);
    let resume = Hello::resume(SESSION, granted.resume_secret, Features::RESUME);
    let verdict = registry.hello(&resume, draws());
    assert!(matches!(verdict, Verdict::Resume(..)), "{verdict:?}");
    registry.clear();
    registry.set_yields(true);
    let verdict = registry.hello(&start(), draws());
    assert!(matches!(verdict, Verdict::Start(..)), "{verdict:?}");
}

// SPEC: ASK-1
#[test]
fn whoever_runs_no_session_answers_for_the_one_that_ended_and_lets_none_begin() {
    let secret = [3; 16];
    let ticket = AskTicket::new(SESSION.value(), secret);
    let mut registry = Registry::of_ended(&config().build().unwrap(), ticket);
    let secret = Token::new(secret);
    let verdict = registry.hello(&Hello::ask(SESSION, secret), draws());
    assert!(matches!(verdict, Verdict::Ask(_)), "{verdict:?}");
    let wrong = Hello::ask(SESSION, Token::new([4; 16]));
    assert!(kept_back(&mut registry, &wrong).is_some());
    let other = Hello::ask(SessionId::new([8; 16]), secret);
    assert_eq!(refused(&mut registry, &other), Reason::WrongSession);
    let resume = Hello::resume(SESSION, secret, Features::RESUME);
    assert_eq!(refused(&mut registry, &resume), Reason::WrongSession);
    assert_eq!(refused(&mut registry, &start()), Reason::Busy);
}
