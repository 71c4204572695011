//! Somebody else who finds the destination's port: what he says, and that he is never let in.
//!
//! He knows the session's name, which is no secret, and nothing else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use multifd_receiver as rx;
use multifd_transport::Spawner;
use multifd_wire::{
    ChannelRef, HELLO_REPLY_BYTES, Hello, HelloReply, Incarnation, Intent, LaneId, Token,
};

use super::network::{self, Quality};
use super::world::World;
use super::{SmallThreads, schedule};

/// How long he waits for an answer, and stays when he says nothing.
const PATIENCE: Duration = Duration::from_secs(2);

/// He dials, and does what was drawn.
pub(super) fn comes(
    world: &Arc<World>,
    destination: &rx::Handle,
    quality: Quality,
    draw: u64,
    hello: Hello,
) {
    let (ours, theirs, _) = network::connect(world, ChannelRef::None, quality);
    if destination.offer(theirs).is_err() {
        return;
    }
    let world = Arc::clone(world);
    let body = move || {
        let (mut tx, mut rx, _closer) = ours.split();
        let token = Token::new(
            draw.wrapping_mul(0x9E37_79B9_7F4A_7C15)
                .to_le_bytes()
                .repeat(2)
                .try_into()
                .unwrap_or([7; 16]),
        );
        let mut said = match draw % 8 {
            0 => return schedule::sleep(PATIENCE.as_nanos() as u64),
            1 => draw.to_le_bytes().repeat(16),
            2 => draw.to_le_bytes().repeat(4),
            // The source's own words, but for the intent.
            3 => Hello {
                intent: Intent::Start,
                ..hello
            }
            .encode()
            .to_vec(),
            4 => {
                let lane = LaneId::new((draw >> 8) as u32 % 4);
                let incarnation = Incarnation::new((draw >> 16) as u32 % 2);
                Hello::join(
                    hello.session,
                    token,
                    hello.features_optional,
                    lane,
                    incarnation,
                )
                .encode()
                .to_vec()
            }
            5 => Hello::resume(hello.session, token, hello.features_optional)
                .encode()
                .to_vec(),
            6 => Hello::ask(hello.session, token).encode().to_vec(),
            _ => Hello::resume(hello.session, Token::new([0; 16]), hello.features_optional)
                .encode()
                .to_vec(),
        };
        let deadline = Some(Instant::now() + PATIENCE);
        tx.set_deadline(deadline);
        rx.set_deadline(deadline);
        if tx.send(&said, &[]).is_err() {
            return;
        }
        let mut octets = [0; HELLO_REPLY_BYTES];
        if rx.receive(&mut octets).is_ok()
            && let Ok(reply @ HelloReply::Accepted { .. }) = HelloReply::decode(&octets)
        {
            said.truncate(40);
            world.let_in(&format!("he said {said:02x?}, and was told {reply:?}"));
        }
    };
    // Without a thread nobody comes.
    let _ = SmallThreads(schedule::Group::Nobody).spawn("stranger", Box::new(body));
}
