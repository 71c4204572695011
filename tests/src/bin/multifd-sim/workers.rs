//! Several processes that share the seeds: a simulation runs one thread at a time, so one process uses one processor.
//!
//! Each worker keeps to one processor, where handing the baton on is cheapest, and says what it counted in lines. One that a
//! simulation took down (it hung, or a thread panicked) is replaced, and goes on behind that seed, if that is wanted.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_setaffinity};

use super::Arguments;
use super::tally::Tally;

/// How often the whole run says how far it is.
const TELL: Duration = Duration::from_secs(60);

/// Runs all seeds in as many processes as were asked for.
pub(crate) fn share(arguments: &Arguments) -> Tally {
    let (words, heard) = crossbeam_channel::unbounded();
    let began = Instant::now();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let mut threads = Vec::new();
    for worker in 0..arguments.jobs {
        let words = words.clone();
        let mut arguments = arguments.clone();
        let share = arguments.count / arguments.jobs;
        let more = u64::from(worker < arguments.count % arguments.jobs);
        arguments.count = share + more;
        arguments.from += worker;
        arguments.stride = Some(arguments.jobs);
        arguments.processor = (arguments.jobs as usize <= processors).then_some(worker as usize);
        threads.push(std::thread::spawn(move || {
            while arguments.count > 0 {
                let mut child = start(&arguments);
                let told = child.stdout.take().map(|out| listen(out, &words));
                let end = child.wait();
                match end.as_ref().ok().and_then(ExitStatus::code) {
                    // All its seeds, or up to the one at which it was to stop.
                    Some(0 | 1) => return,
                    // The scheduler's last words.
                    Some(70 | 71) => {}
                    _ => {
                        let how = end.map_or_else(|error| error.to_string(), |end| end.to_string());
                        let _ = words.send(Word::Died(how));
                        return;
                    }
                }
                let _ = words.send(Word::Broken);
                let Some(Some(seed)) = told.filter(|_| arguments.keep_going) else {
                    return;
                };
                let done = (seed - arguments.from) / arguments.jobs + 1;
                arguments.count = arguments.count.saturating_sub(done);
                arguments.from += done * arguments.jobs;
                if let Some(seconds) = arguments.seconds {
                    arguments.seconds = Some(seconds.saturating_sub(began.elapsed().as_secs()));
                }
            }
        }));
    }
    drop(words);
    let mut tally = Tally::default();
    let mut told = began;
    for word in heard {
        match word {
            Word::Line(line) => {
                if !tally.hear(&line) {
                    println!("{line}");
                }
            }
            Word::Broken => tally.add_broken(),
            Word::Died(how) => {
                eprintln!("a worker ended with {how}: the rest of its seeds is not simulated");
                tally.add_unfinished();
            }
        }
        if told.elapsed() > TELL {
            told = Instant::now();
            eprintln!(
                "{} migrations, {} with violations",
                tally.migrations(),
                tally.violations()
            );
        }
    }
    for thread in threads {
        let _ = thread.join();
    }
    tally
}

/// What workers say.
enum Word {
    Line(String),
    /// A worker was taken down by its simulation.
    Broken,
    /// A worker ended before its last seed, through no fault of a simulation: it was killed, say, for want of memory.
    Died(String),
}

/// Passes a worker's lines on. Gives the seed that it had at last, if it said so.
fn listen(out: ChildStdout, words: &crossbeam_channel::Sender<Word>) -> Option<u64> {
    let mut seed = None;
    for line in BufReader::new(out).lines().map_while(Result::ok) {
        if let Some(rest) = line.strip_prefix("VIOLATION seed ") {
            let digits = rest.split(':').next().unwrap_or_default();
            seed = digits.parse().ok().or(seed);
        }
        let _ = words.send(Word::Line(line));
    }
    seed
}

fn start(arguments: &Arguments) -> Child {
    let program = std::env::current_exe().expect("this program has a path");
    let mut command = Command::new(program);
    command
        .args(["--from", &arguments.from.to_string()])
        .args(["--count", &arguments.count.to_string()])
        .args(["--stride", &arguments.stride.unwrap_or(1).to_string()])
        .stdout(Stdio::piped());
    if let Some(seconds) = arguments.seconds {
        command.args(["--seconds", &seconds.to_string()]);
    }
    if let Some(processor) = arguments.processor {
        command.args(["--processor", &processor.to_string()]);
    }
    let flags = [
        (arguments.flips, "--flips"),
        (arguments.calm, "--calm"),
        (arguments.twice, "--twice"),
        (arguments.keep_going, "--keep-going"),
    ];
    command.args(flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag));
    command.spawn().expect("this program can be started again")
}

/// Keeps this process, which has one thread yet, to a processor. If that can't be done it is slower, and nothing else.
pub(crate) fn keep_to(processor: usize) {
    let mut set = CpuSet::new();
    set.set(processor);
    let _ = sched_setaffinity(None, &set);
}
