#!/usr/bin/env python3
"""Writes the test vectors of this directory, and the fuzz corpus that is made of them, from SPEC.md alone.

This is a second, independent reading of the specification: it shares no code with the Rust crate, so a mistake in one
of them shows as a difference. Run it without arguments from anywhere; it needs nothing but Python 3.8. The output is
committed, and the tests read only the committed files.
"""

import copy
import pathlib
import struct
import zlib

HERE = pathlib.Path(__file__).resolve().parent
CORPUS = HERE.parent.parent / "fuzz" / "corpus"

PAGE = 4096
MASK = (1 << 64) - 1
ZERO_CRC = zlib.crc32(bytes(PAGE))
MAGIC = b"MULTIFD\n"
SESSION = bytes(range(0x10, 0x20))
TICKET = bytes(range(0x20, 0x30))
SECRET = bytes(range(0x30, 0x40))
MIB = 1 << 20
NONE = 0xFFFFFFFF

KINDS = {
    "GRANT": 0x0001, "CONFIG": 0x0002, "REGIONS": 0x0003, "DEVICES": 0x0004, "SETUP_END": 0x0005, "READY": 0x0006,
    "PAGES": 0x0010, "ZEROS": 0x0011, "ROUND_END": 0x0012, "DEVICE_CHUNK": 0x0013, "DEVICE_MARK": 0x0014,
    "ACK": 0x0020, "GIVE_BACK": 0x0021, "ROUND_CLOSED": 0x0022, "CREDIT": 0x0023, "SWITCHOVER_ACK": 0x0024,
    "DEVICE_LOADED": 0x0025, "KEEP_ALIVE": 0x0027, "LANE_DOWN": 0x0028, "SWITCHOVER": 0x0030, "VM_STATE": 0x0031,
    "FINAL": 0x0032, "PREPARED": 0x0033, "COMMIT": 0x0034, "RUNNING": 0x0035, "ABORT": 0x0036, "LANDED": 0x0040,
    "OUTCOME": 0x0042, "STREAM_OPEN": 0x0050, "STREAM_DATA": 0x0051, "STREAM_CREDIT": 0x0052, "STREAM_END": 0x0053,
    "STREAM_OUTCOME": 0x0054, "PROGRESS": 0x8026,
}


class Octets:
    """Octets with a remark for each field; each line of a vector file is one field."""

    def __init__(self):
        self.lines = []

    def put(self, raw, remark):
        self.lines.append((bytes(raw), remark))
        return self

    def u8(self, value, name):
        return self.put(struct.pack("<B", value), f"{name} = {value}")

    def u16(self, value, name):
        return self.put(struct.pack("<H", value), f"{name} = {value}")

    def u32(self, value, name):
        return self.put(struct.pack("<I", value), f"{name} = {value}")

    def u64(self, value, name):
        return self.put(struct.pack("<Q", value), f"{name} = {value}")

    def hex32(self, value, name):
        return self.put(struct.pack("<I", value), f"{name} = {value:#010x}")

    def hex64(self, value, name):
        return self.put(struct.pack("<Q", value), f"{name} = {value:#018x}")

    def zero(self, count, name="reserved"):
        return self.put(bytes(count), name)

    def text(self, value, name):
        return self.put(value, f"{name} = {value.decode('utf-8', 'replace')!r}")

    def join(self, other):
        self.lines += other.lines
        return self

    def raw(self):
        return b"".join(raw for raw, _ in self.lines)


def show(raw, remark):
    """One field as lines of text; a long field of equal octets is written as `HH * count`."""
    if not raw:
        return [f"; {remark} (no octets)"]
    if len(raw) > 16 and len(set(raw)) == 1:
        return [f"{raw[0]:02x} * {len(raw)} ; {remark}"]
    rows = [raw[at:at + 16].hex(" ") for at in range(0, len(raw), 16)]
    rows[0] += f" ; {remark}"
    return rows


def write(name, structure, expect, rules, octets):
    """Writes one vector and, where a fuzz target reads such octets, one corpus entry."""
    text = [f"name: {name}", f"structure: {structure}", f"expect: {expect}", f"spec: {' '.join(rules)}", "octets:"]
    for raw, remark in octets.lines:
        text += show(raw, remark)
    (HERE / f"{name}.txt").write_text("\n".join(text) + "\n")
    for target in {"frame": ["frame", "stream"]}.get(structure, [structure]):
        seed(target, name, octets.raw())
    if structure == "frame":
        seed("header", name, octets.raw()[:32])


def seed(target, name, raw):
    directory = CORPUS / target
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(raw)


# --- structures -----------------------------------------------------------------------------------------------------

def parameters(out, values):
    for bit, key, value in values:
        out.u16(bit + 1, "parameter.feature").u16(key, "parameter.key").u32(value, "parameter.value")
    return out.zero(8 * (6 - len(values)), "unused parameters")


def hello(intent=1, token=bytes(16), lane=0, incarnation=0, magic=MAGIC, versions=(1, 1), role=1, channel=0,
          mandatory=0, optional=3, session=SESSION, values=(), reserved=0, crc=None):
    out = Octets().put(magic, "magic")
    out.u16(versions[0], "version_min").u16(versions[1], "version_max").u8(role, "role").u8(channel, "channel")
    out.u16(intent, "intent").hex64(mandatory, "features_mandatory").hex64(optional, "features_optional")
    out.put(session, "session").put(token, "token").u32(lane, "lane").u32(incarnation, "incarnation")
    parameters(out, values).u32(reserved, "reserved")
    return out.hex32(zlib.crc32(out.raw()) if crc is None else crc, "crc")


def hello_reply(version=1, status=0, reason=0, features=3, session=SESSION, role=2, text=b"", text_bytes=None,
                magic=MAGIC, values=(), reserved=(bytes(7), bytes(6), bytes(12)), crc=None):
    out = Octets().put(magic, "magic").u16(version, "version").u16(status, "status").u32(reason, "reason")
    out.hex64(features, "features").put(session, "session").u8(role, "role").put(reserved[0], "reserved")
    out.u16(len(text) if text_bytes is None else text_bytes, "text_bytes").put(reserved[1], "reserved")
    out.text(text, "text").zero(136 - len(text), "rest of text")
    parameters(out, values).put(reserved[2], "reserved")
    return out.hex32(zlib.crc32(out.raw()) if crc is None else crc, "crc")


def frame(kind, table, sequence=0, body=b"", reserved=0, table_bytes=None, body_bytes=None, table_crc=None,
          body_crc=None, header_crc=None, bodies=None):
    code = KINDS[kind] if isinstance(kind, str) else kind
    if body_crc is None:
        body_crc = 0 if kind == "PAGES" else zlib.crc32(body)
    out = Octets().put(struct.pack("<H", code), f"kind = {code:#06x} {kind if isinstance(kind, str) else ''}".rstrip())
    out.u16(reserved, "reserved")
    out.u32(len(table.raw()) if table_bytes is None else table_bytes, "table_bytes").u64(sequence, "sequence")
    out.u32(len(body) if body_bytes is None else body_bytes, "body_bytes")
    out.hex32(zlib.crc32(table.raw()) if table_crc is None else table_crc, "table_crc").hex32(body_crc, "body_crc")
    out.hex32(zlib.crc32(out.raw()) if header_crc is None else header_crc, "header_crc").join(table)
    for piece in bodies if bodies is not None else [body] if body else []:
        out.put(piece, "body")
    return out


def grant(lanes_max=16, ticket=TICKET, secret=SECRET, suspend_ms=30000, window=33554432):
    out = Octets().put(ticket, "ticket").put(secret, "resume_secret").u32(lanes_max, "lanes_max")
    return out.u32(suspend_ms, "suspend_ms").u64(window, "device_window_bytes").zero(16)


def blob(kind=1, version=2, index=0, part=0, blob_bytes=0, reserved=0):
    out = Octets().u32(kind, "blob_kind").u32(version, "version").u32(index, "index").u32(part, "part")
    return out.u64(blob_bytes, "blob_bytes").u64(reserved, "reserved")


REGIONS = [(0, 0, 0x100000), (1, 0x100000000, 0x200000)]


def regions(entries=REGIONS, count=None, flags=0):
    out = Octets().u32(len(entries) if count is None else count, "count").zero(4)
    for number, address, size in entries:
        out.u32(number, "id").u32(flags, "flags").hex64(address, "guest_address").u64(size, "bytes").zero(8)
    return out


DEVICES = [(0, 15, 1048576, 104857600, 1048576, b"net0"), (1, 0, 0, 65536, 65536, b"rng")]


def devices(entries=DEVICES, count=None):
    out = Octets().u32(len(entries) if count is None else count, "count").zero(4)
    for number, flags, initial, state, chunk, name in entries:
        out.u32(number, "id").u32(flags, "flags").u64(initial, "initial_bytes").u64(state, "state_bytes")
        out.u64(chunk, "chunk_bytes_max").u16(len(name), "name_bytes").zero(6)
        out.text(name, "name").zero(64 - len(name), "rest of name").zero(8)
    return out


def setup_end(configs=1, region_count=2, device_count=2, lanes=4, memory=0x300000):
    out = Octets().u32(configs, "configs").u32(region_count, "regions").u32(device_count, "devices")
    return out.u32(lanes, "lanes").u64(memory, "memory_bytes").zero(8)


def ready(lanes=4, prepare_us=12345):
    return Octets().u32(lanes, "lanes").zero(4).u64(prepare_us, "prepare_us")


def runs(out, entries):
    for region, first, count in entries:
        out.u32(region, "run.region").u32(count, "run.count").u64(first, "run.first")
    return out


def pages_table(round_number, entries, contents, page_count=None, run_count=None, reserved=0):
    out = Octets().u32(round_number, "round").u32(len(entries) if run_count is None else run_count, "run_count")
    out.u32(len(contents) if page_count is None else page_count, "page_count").u32(reserved, "reserved")
    runs(out, entries)
    for content in contents:
        out.hex32(zlib.crc32(content), "checksum")
    return out


def pages(round_number, entries, contents, sequence=0, **other):
    table_keys = ("page_count", "run_count", "reserved")
    table = pages_table(round_number, entries, contents, **{k: other.pop(k) for k in table_keys if k in other})
    return frame("PAGES", table, sequence, b"".join(contents), bodies=contents, **other)


def zeros(round_number, entries, page_count=None, run_count=None):
    total = sum(count for _, _, count in entries)
    out = Octets().u32(round_number, "round").u32(len(entries) if run_count is None else run_count, "run_count")
    return runs(out.u64(total if page_count is None else page_count, "page_count"), entries)


def round_end(round_number, flags, page_count, zero_pages):
    out = Octets().u32(round_number, "round").u32(flags, "flags").u64(page_count, "pages")
    return out.u64(zero_pages, "zero_pages").zero(8)


def device_chunk(device, section, index, offset):
    out = Octets().u32(device, "device").u32(section, "section").u64(index, "index").u64(offset, "offset")
    return out.zero(8)


def device_mark(device, mark, generation, index, offset):
    out = Octets().u32(device, "device").u32(mark, "mark").u32(generation, "generation").zero(4)
    return out.u64(index, "index").u64(offset, "offset")


def lane_marks(out, entries):
    for lane, incarnation, frames in entries:
        out.u32(lane, "lane").u32(incarnation, "incarnation").u64(frames, "frames")
    return out


def ack(entries, count=None):
    return lane_marks(Octets().u32(len(entries) if count is None else count, "count").zero(4), entries)


def give_back(lane, incarnation, sequence, reason, entries):
    out = Octets().u32(lane, "lane").u32(incarnation, "incarnation").u64(sequence, "sequence")
    return runs(out.u32(len(entries), "count").u32(reason, "reason"), entries)


def round_closed(round_number, page_count, zero_pages, digest, elapsed_us, damaged=0):
    out = Octets().u32(round_number, "round").zero(4).u64(page_count, "pages").u64(zero_pages, "zero_pages")
    return out.hex64(digest, "digest").u64(elapsed_us, "elapsed_us").u64(damaged, "damaged_pages")


def credit(entries):
    out = Octets().u32(len(entries), "count").zero(4)
    for device, offset_max in entries:
        out.u32(device, "device").zero(4).u64(offset_max, "offset_max")
    return out


def switchover_ack(device, generation, size, load_us):
    return Octets().u32(device, "device").u32(generation, "generation").u64(size, "bytes").u64(load_us, "load_us")


def device_loaded(device, size, load_us, config_us):
    out = Octets().u32(device, "device").zero(4).u64(size, "bytes").u64(load_us, "load_us")
    return out.u64(config_us, "config_us")


def progress(landed, zero_pages, frames, cpu_us, round_number, lanes):
    out = Octets().u64(landed, "landed_bytes").u64(zero_pages, "zero_pages").u64(frames, "frames")
    return out.u64(cpu_us, "cpu_us").u32(round_number, "round").u32(lanes, "lanes").zero(8)


def keep_alive(stamp_us, echo_us=0, held_us=0, flags=1):
    out = Octets().u64(stamp_us, "stamp_us").u64(echo_us, "echo_us").u64(held_us, "held_us")
    return out.u32(flags, "flags").zero(4)


def lane_down(lane, incarnation, reason):
    return Octets().u32(lane, "lane").u32(incarnation, "incarnation").u32(reason, "reason").zero(4)


def switchover(round_number):
    return Octets().u32(round_number, "final_round").zero(4).zero(8)


def final(round_number, states, digest, memory_pages, guest=0):
    out = Octets().u32(round_number, "final_round").u32(states, "states").hex64(digest, "digest")
    return out.u64(memory_pages, "memory_pages").zero(8).u32(guest, "guest").zero(4)


def prepared(digest, wait_us, load_us, verify_us):
    out = Octets().hex64(digest, "digest").u64(wait_us, "wait_us").u64(load_us, "load_us")
    return out.u64(verify_us, "verify_us").zero(8)


def commit(digest):
    return Octets().hex64(digest, "digest")


def running(resume_us, cpu_us, landed):
    return Octets().u64(resume_us, "resume_us").u64(cpu_us, "cpu_us").u64(landed, "landed_bytes").zero(8)


def abort(reason, phase, channel, text, text_bytes=None):
    out = Octets().u32(reason, "reason").u32(phase, "phase").u32(channel, "channel")
    return out.u32(len(text) if text_bytes is None else text_bytes, "text_bytes").text(text, "text")


def landed(rounds_closed, entries):
    return lane_marks(Octets().u32(rounds_closed, "rounds_closed").u32(len(entries), "count").zero(8), entries)


def outcome(state):
    return Octets().u32(state, "state").zero(4).zero(8)


def stream_open(stream):
    return Octets().u32(stream, "stream").zero(4).zero(8)


def stream_data(stream, offset):
    return Octets().u32(stream, "stream").zero(4).u64(offset, "offset")


def stream_credit(entries, count=None):
    out = Octets().u32(len(entries) if count is None else count, "count").zero(4)
    for stream, received, offset_max in entries:
        out.u32(stream, "stream").zero(4).u64(received, "received").u64(offset_max, "offset_max")
    return out


def stream_end(stream, how, offset):
    return Octets().u32(stream, "stream").u32(how, "how").u64(offset, "offset")


# --- the digest -----------------------------------------------------------------------------------------------------

def page_value(content):
    return zlib.crc32(content) ^ ZERO_CRC


def term(region, page, value):
    if value == 0:
        return 0
    mixed = ((region << 40) | page) * 0x9E3779B97F4A7C15 & MASK
    mixed ^= value * 0xC2B2AE3D27D4EB4F & MASK
    mixed ^= mixed >> 29
    mixed = mixed * 0xBF58476D1CE4E5B9 & MASK
    return mixed ^ (mixed >> 32)


def digest_file():
    lines = ["name: digest", "structure: digest", "expect: accept", "spec: DIGEST-1 DIGEST-2 DIGEST-3",
             "terms:",
             "; a line is: the octet that fills the page, region, page, CRC-32, value, term, sum of the terms so far"]
    total = 0
    cases = [(0x00, 0, 0), (0x11, 0, 0), (0x11, 0, 1), (0x11, 1, 0), (0xA5, 0, 3), (0xFF, 1023, (1 << 40) - 1),
             (0x00, 5, 77), (0x01, 7, 123456789)]
    for octet, region, page in cases:
        content = bytes([octet]) * PAGE
        one = term(region, page, page_value(content))
        total = (total + one) & MASK
        lines.append(f"{octet:02x} {region} {page} {zlib.crc32(content):08x} {page_value(content):08x} "
                     f"{one:016x} {total:016x}")
    (HERE / "digest.txt").write_text("\n".join(lines) + "\n")


# --- the vectors ----------------------------------------------------------------------------------------------------

def page(octet):
    return bytes([octet]) * PAGE


def accepted():
    def yes(name, structure, rules, octets):
        write(name, structure, "accept", rules.split(), octets)

    yes("hello-start", "hello", "HELLO-1 HELLO-5", hello())
    yes("hello-start-with-pass", "hello", "HELLO-8", hello(token=TICKET))
    yes("hello-join", "hello", "HELLO-5 JOIN-1",
        hello(2, TICKET, lane=3, incarnation=1, channel=1, mandatory=3, optional=0))
    yes("hello-resume", "hello", "HELLO-5 RESUME-1", hello(3, SECRET, mandatory=3, optional=0))
    yes("hello-ask", "hello", "HELLO-5 ASK-1", hello(4, SECRET, optional=0))
    yes("hello-later-version", "hello", "VER-2", hello(versions=(1, 9), optional=0xFFFF))
    yes("hello-parameters", "hello", "PARAM-1 PARAM-3",
        hello(optional=3 | 1 << 40 | 1 << 63, values=[(40, 0, 65536), (40, 7, 1), (63, 0, 0xFFFFFFFF)]))
    yes("reply-parameters", "hello_reply", "PARAM-1 PARAM-2", hello_reply(values=[(1, 0, 5)]))
    yes("reply-accepted", "hello_reply", "REPLY-2", hello_reply())
    yes("reply-refused", "hello_reply", "REPLY-3",
        hello_reply(0, 1, 12, 0, text="beschäftigt: try again".encode()))
    yes("reply-refused-bare", "hello_reply", "REPLY-3 EXT-4", hello_reply(0, 1, 4096, 0, session=bytes(16)))

    def each(name, kind, rules, table, sequence=0, body=b""):
        yes(name, "frame", rules, frame(kind, table, sequence, body))

    each("grant", "GRANT", "GRANT-1", grant())
    each("config", "CONFIG", "BLOB-1", blob(blob_bytes=5), 0, b"hello")
    each("config-empty", "CONFIG", "BLOB-3", blob(index=1), 1)
    each("config-last-part", "CONFIG", "BLOB-2", blob(7, 1, 63, 1, MIB + 3), 2, b"end")
    each("regions", "REGIONS", "REGION-1", regions(), 1)
    each("devices", "DEVICES", "DEVICE-1", devices(), 2)
    each("devices-none", "DEVICES", "DEVICE-1", devices([]), 2)
    each("setup_end", "SETUP_END", "SETUP-2", setup_end(), 3)
    each("ready", "READY", "READY-1", ready(), 1)
    yes("pages", "frame", "PAGES-1 PAGES-2", pages(0, [(0, 3, 1)], [page(0xA5)]))
    yes("pages-runs", "frame", "PAGES-3 PAGES-4",
        pages(7, [(0, 1, 1), (1, 16, 2)], [page(0x11), page(0x22), page(0x33)], 9))
    each("zeros", "ZEROS", "ZEROS-1", zeros(0, [(0, 0, 3), (1, 100, 412)]), 1)
    each("round_end", "ROUND_END", "ROUND-3", round_end(0, 0, 253, 515), 2)
    each("round_end-final", "ROUND_END", "ROUND-4", round_end(0xFFFFFFFE, 1, 0, 0), 1 << 40)
    each("device_chunk", "DEVICE_CHUNK", "DEVSTREAM-2", device_chunk(1, 0, 0, 0), 3, bytes(range(16)))
    each("device_chunk-config", "DEVICE_CHUNK", "DEVSTREAM-2", device_chunk(255, 1, 41, (1 << 48) - 1), 3, b"\x7f")
    each("device_mark-initial", "DEVICE_MARK", "DEVSTREAM-4", device_mark(1, 1, 1, 1, 16), 4)
    each("device_mark-data", "DEVICE_MARK", "DEVSTREAM-3", device_mark(0, 2, 2, 9, 4096), 4)
    each("device_mark-config", "DEVICE_MARK", "DEVSTREAM-3", device_mark(0, 3, 0, 10, 4097), 4)
    each("device_mark-restart", "DEVICE_MARK", "DEVSTREAM-3", device_mark(0, 4, 0, 11, 1 << 48), 4)
    each("ack", "ACK", "ACK-1", ack([(0, 0, 17), (255, 2, 1 << 33)]), 5)
    each("give_back", "GIVE_BACK", "BACK-3", give_back(2, 1, 99, 1, [(0, 3, 1), (1, 18, 1)]), 6)
    each("round_closed", "ROUND_CLOSED", "CLOSED-1", round_closed(0, 253, 515, 0x0123456789ABCDEF, 2500000, 2), 7)
    each("credit", "CREDIT", "CREDIT-1", credit([(0, 67108864), (1, 65536)]), 8)
    each("switchover_ack", "SWITCHOVER_ACK", "SWACK-1", switchover_ack(0, 1, 1048576, 2200), 9)
    each("device_loaded", "DEVICE_LOADED", "LOADED-1", device_loaded(1, 65536, 800, 90), 10)
    each("progress", "PROGRESS", "PROG-1", progress(1036288, 515, 18, 6400, 1, 4), 11)
    each("keep_alive", "KEEP_ALIVE", "ALIVE-1", keep_alive(1000001, 999000, 250, 0), 12)
    each("keep_alive-asks", "KEEP_ALIVE", "ALIVE-5", keep_alive(1), 12)
    each("lane_down", "LANE_DOWN", "LANE-1", lane_down(3, 1, 18), 13)
    each("switchover", "SWITCHOVER", "SWITCH-1", switchover(6), 14)
    each("vm_state", "VM_STATE", "BLOB-1", blob(3, 1, 0, 0, 8), 15, b"cpu-zero")
    each("final", "FINAL", "FINAL-1", final(6, 1, 0xFEDCBA9876543210, 768), 16)
    each("final-paused", "FINAL", "FINAL-6", final(6, 1, 0xFEDCBA9876543210, 768, 1), 16)
    each("prepared", "PREPARED", "PREP-1", prepared(0xFEDCBA9876543210, 10, 20, 30), 17)
    each("commit", "COMMIT", "COMMIT-1", commit(0xFEDCBA9876543210), 18)
    each("running", "RUNNING", "RUNNING-1", running(150, 7000, 3145728), 19)
    each("abort", "ABORT", "ABORT-1", abort(9, 3, 4, "net0: state refused – näher?".encode()), 20)
    each("abort-bare", "ABORT", "ABORT-1", abort(1, 2, NONE, b""), 20)
    each("landed", "LANDED", "LANDED-1", landed(3, [(0, 0, 120), (1, 2, 77)]), 2)
    each("landed-nothing", "LANDED", "LANDED-1", landed(0, []), 2)
    each("outcome", "OUTCOME", "ASK-2", outcome(3), 0)
    each("stream_open", "STREAM_OPEN", "CARRY-4", stream_open(9), 1)
    each("stream_data", "STREAM_DATA", "CARRY-5", stream_data(0, 0), 2, b"QEVM\0\0\0\x03")
    each("stream_data-last", "STREAM_DATA", "CARRY-5 LIMIT-19", stream_data(1023, (1 << 56) - 1), 3, b"\x7f")
    each("stream_credit", "STREAM_CREDIT", "CARRY-6",
         stream_credit([(0, 68, 65604), (1023, 1 << 40, (1 << 40) + 1)]), 4)
    each("stream_end", "STREAM_END", "CARRY-8", stream_end(0, 1, 1 << 56), 5)
    each("stream_end-reset", "STREAM_END", "CARRY-8", stream_end(7, 2, 0), 6)
    each("stream_outcome", "STREAM_OUTCOME", "CARRY-10", outcome(3), 7)
    each("unknown-optional", 0xFFFE, "EXT-2", Octets().put(b"\x01\x02\x03", "what a later version put here"), 4,
         b"later")


def rejected():
    def no(name, structure, code, rules, octets):
        write("reject-" + name, structure, code, rules.split(), octets)

    bad = "wire.malformed."
    no("hello-magic", "hello", bad + "magic", "HELLO-2", hello(magic=b"MULTIFD\r"))
    no("hello-crc", "hello", bad + "hello-crc", "HELLO-4", hello(crc=0))
    no("hello-versions", "hello", bad + "value", "VER-1", hello(versions=(2, 1)))
    no("hello-version-zero", "hello", bad + "value", "VER-1", hello(versions=(0, 1)))
    no("hello-role", "hello", bad + "value", "HELLO-6", hello(role=2))
    no("hello-channel", "hello", bad + "value", "HELLO-6", hello(channel=2))
    no("hello-intent", "hello", bad + "value", "HELLO-6", hello(5))
    no("hello-join-on-control", "hello", bad + "value", "HELLO-6", hello(2, TICKET))
    no("hello-session", "hello", bad + "value", "HELLO-7", hello(session=bytes(16)))
    no("hello-join-without-ticket", "hello", bad + "value", "HELLO-8", hello(2, channel=1))
    no("hello-control-lane", "hello", bad + "reserved", "HELLO-9", hello(lane=1))
    no("hello-lane", "hello", bad + "value", "LIMIT-9", hello(2, TICKET, lane=256, channel=1))
    no("hello-reserved", "hello", bad + "reserved", "GEN-3", hello(reserved=1 << 31))
    no("hello-feature-twice", "hello", bad + "value", "FEAT-2", hello(mandatory=1, optional=1))
    no("hello-parameters-falling", "hello", bad + "value", "PARAM-1", hello(values=[(1, 0, 1), (0, 0, 1)]))
    no("hello-parameters-twice", "hello", bad + "value", "PARAM-1", hello(values=[(1, 0, 1), (1, 0, 1)]))
    no("hello-parameters-gap", "hello", bad + "value", "PARAM-1", hello(values=[(-1, 0, 0), (1, 0, 1)]))
    no("hello-parameters-of-nothing", "hello", bad + "reserved", "PARAM-1", hello(values=[(-1, 0, 1)]))
    no("hello-parameters-no-bit", "hello", bad + "value", "PARAM-2", hello(values=[(64, 0, 1)]))
    no("hello-parameters-not-named", "hello", bad + "value", "PARAM-2", hello(values=[(2, 0, 1)]))
    no("hello-parameters-in-a-resume", "hello", bad + "value", "PARAM-2",
       hello(3, SECRET, mandatory=3, optional=0, values=[(1, 0, 1)]))
    no("reply-parameters-not-agreed", "hello_reply", bad + "value", "PARAM-2", hello_reply(values=[(2, 0, 1)]))
    no("reply-parameters-refused", "hello_reply", bad + "value", "PARAM-2", hello_reply(0, 1, 12, 0, values=[(0, 0, 1)]))
    no("reply-magic", "hello_reply", bad + "magic", "HELLO-2", hello_reply(magic=b"HTTP/1.1"))
    no("reply-crc", "hello_reply", bad + "hello-crc", "REPLY-1", hello_reply(crc=1))
    no("reply-status", "hello_reply", bad + "value", "REPLY-1", hello_reply(status=2))
    no("reply-accepted-with-reason", "hello_reply", bad + "reserved", "REPLY-2", hello_reply(reason=1))
    no("reply-refused-without-reason", "hello_reply", bad + "value", "REPLY-3", hello_reply(0, 1, 0, 0))
    no("reply-role", "hello_reply", bad + "value", "REPLY-1", hello_reply(role=1))
    no("reply-control-character", "hello_reply", bad + "text", "TEXT-1", hello_reply(0, 1, 12, 0, text=b"\x1b[2J"))
    no("reply-text-too-long", "hello_reply", bad + "text", "LIMIT-13 REPLY-4", hello_reply(0, 1, 12, 0, text_bytes=137))
    no("reply-text-tail", "hello_reply", bad + "reserved", "TEXT-2 REPLY-4",
       hello_reply(0, 1, 12, 0, text=b"busy!", text_bytes=4))

    no("header-crc", "frame", bad + "header-crc", "HEAD-2", frame("COMMIT", commit(1), header_crc=0))
    no("header-reserved", "frame", bad + "reserved", "HEAD-3", frame("COMMIT", commit(1), reserved=1))
    no("unknown-mandatory", "frame", bad + "unknown-kind", "EXT-1 HEAD-4", frame(0x7FFE, Octets()))
    no("unknown-optional-too-long", "frame", bad + "table-bytes", "LIMIT-1", frame(0xFFFE, Octets(), table_bytes=65537))
    no("unknown-optional-body-too-long", "frame", bad + "body-bytes", "LIMIT-2",
       frame(0xFFFE, Octets(), body_bytes=MIB + 1))
    no("table-bytes", "frame", bad + "table-bytes", "HEAD-5", frame("COMMIT", Octets().zero(12)))
    no("table-crc", "frame", bad + "table-crc", "HEAD-6", frame("COMMIT", commit(1), table_crc=5))
    no("body-where-none", "frame", bad + "body-bytes", "HEAD-5", frame("COMMIT", commit(1), body=b"x"))
    no("body-crc-of-nothing", "frame", bad + "value", "HEAD-7", frame("COMMIT", commit(1), body_crc=1))
    no("body-crc", "frame", bad + "body-crc", "HEAD-7 ERR-4",
       frame("DEVICE_CHUNK", device_chunk(0, 0, 0, 0), body=b"x", body_crc=1))
    no("grant-no-ticket", "frame", bad + "value", "GRANT-1", frame("GRANT", grant(ticket=bytes(16))))
    no("grant-no-lanes", "frame", bad + "value", "GRANT-2", frame("GRANT", grant(0)))
    no("grant-too-many-lanes", "frame", bad + "value", "LIMIT-9", frame("GRANT", grant(257)))
    no("config-short-part", "frame", bad + "body-bytes", "BLOB-2", frame("CONFIG", blob(blob_bytes=6), body=b"hello"))
    no("config-part-past-end", "frame", bad + "value", "BLOB-2", frame("CONFIG", blob(part=1, blob_bytes=5)))
    no("config-too-long", "frame", bad + "value", "LIMIT-10",
       frame("CONFIG", blob(part=16, blob_bytes=16 * MIB + 1), body=b"x"))
    no("config-empty-second-part", "frame", bad + "value", "BLOB-3", frame("CONFIG", blob(part=1)))
    no("config-too-many", "frame", bad + "value", "LIMIT-11 BLOB-1", frame("CONFIG", blob(index=64)))
    no("regions-count", "frame", bad + "count", "REGION-5", frame("REGIONS", regions(count=3)))
    no("regions-flags", "frame", bad + "reserved", "REGION-5", frame("REGIONS", regions(flags=1)))
    no("regions-none", "frame", bad + "table-bytes", "REGION-1", frame("REGIONS", regions([])))
    for name, code, rule, entries in [
            ("order", "order", "REGION-1", [(0, 0, PAGE), (2, PAGE, PAGE)]),
            ("unaligned", "alignment", "REGION-2", [(0, 512, PAGE)]),
            ("empty", "alignment", "REGION-2", [(0, 0, 0)]),
            ("wraps", "wraps", "REGION-3", [(0, (1 << 64) - PAGE, PAGE)]),
            ("overlap", "overlap", "REGION-3", [(0, PAGE, 2 * PAGE), (1, 0, 2 * PAGE)]),
            ("pages", "pages", "LIMIT-15 REGION-4", [(0, 0, 1 << 52), (1, 1 << 52, PAGE)])]:
        no("layout-" + name, "frame", "wire.layout." + code, rule, frame("REGIONS", regions(entries)))
    no("devices-flags", "frame", bad + "reserved", "DEVICE-2", frame("DEVICES", devices([(0, 16, 0, 0, 1, b"a")])))
    no("devices-ack-without-pre-copy", "frame", bad + "value", "DEVICE-5",
       frame("DEVICES", devices([(0, 4, 0, 0, 1, b"a")])))
    no("devices-initial-without-pre-copy", "frame", bad + "value", "DEVICE-5",
       frame("DEVICES", devices([(0, 2, 1, 0, 1, b"a")])))
    no("devices-no-name", "frame", bad + "value", "DEVICE-4", frame("DEVICES", devices([(0, 0, 0, 0, 1, b"")])))
    no("devices-same-name", "frame", bad + "value", "DEVICE-4",
       frame("DEVICES", devices([(0, 0, 0, 0, 1, b"a"), (1, 0, 0, 0, 1, b"a")])))
    no("devices-name-not-utf8", "frame", bad + "text", "TEXT-1",
       frame("DEVICES", devices([(0, 0, 0, 0, 1, b"\xff\xfe")])))
    no("devices-order", "frame", bad + "value", "DEVICE-1", frame("DEVICES", devices([(1, 0, 0, 0, 1, b"a")])))
    no("devices-chunk-too-long", "frame", bad + "value", "DEVICE-3",
       frame("DEVICES", devices([(0, 0, 0, 0, MIB + 1, b"a")])))
    no("frame-reserved-before-kind", "frame", bad + "reserved", "HEAD-10", frame(0x7FFE, commit(1), reserved=1))
    no("frame-sizes-before-checksum", "frame", bad + "table-bytes", "HEAD-10", frame("COMMIT", Octets().zero(12), table_crc=5))
    no("frame-body-crc-before-table-crc", "frame", bad + "value", "HEAD-10", frame("COMMIT", commit(1), table_crc=5, body_crc=1))
    no("frame-table-crc-before-table", "frame", bad + "table-crc", "HEAD-10", frame("OUTCOME", outcome(0), table_crc=5))
    no("frame-table-before-body", "frame", bad + "value", "HEAD-10",
       frame("DEVICE_CHUNK", device_chunk(256, 0, 0, 0), body=b"x", body_crc=1))
    no("setup_end-memory", "frame", bad + "value", "LIMIT-15", frame("SETUP_END", setup_end(memory=4097)))
    no("setup_end-no-memory", "frame", bad + "value", "LIMIT-15", frame("SETUP_END", setup_end(memory=0)))
    no("setup_end-too-much-memory", "frame", bad + "value", "LIMIT-15", frame("SETUP_END", setup_end(memory=(1 << 52) + PAGE)))
    no("ready-no-lanes", "frame", bad + "value", "READY-1", frame("READY", ready(0)))
    no("pages-count", "frame", bad + "count", "PAGES-3", pages(0, [(0, 3, 2)], [page(1)]))
    no("pages-count-over-runs", "frame", bad + "count", "PAGES-3", pages(0, [(0, 3, 1)], [page(1), page(2)]))
    no("pages-body", "frame", bad + "body-bytes", "PAGES-3",
       pages(0, [(0, 3, 1)], [page(1)], body_bytes=2 * PAGE))
    no("pages-body-half-a-page", "frame", bad + "body-bytes", "PAGES-1",
       pages(0, [(0, 3, 1)], [page(1)], body_bytes=PAGE + 2048))
    no("pages-body-crc", "frame", bad + "value", "PAGES-5", pages(0, [(0, 3, 1)], [page(1)], body_crc=7))
    no("pages-empty-run", "frame", bad + "value", "RUN-2", pages(0, [(0, 3, 0), (0, 4, 1)], [page(1)]))
    no("pages-region", "frame", bad + "value", "RUN-4", pages(0, [(1024, 0, 1)], [page(1)]))
    no("pages-first", "frame", bad + "value", "RUN-4", pages(0, [(0, 1 << 40, 1)], [page(1)]))
    no("pages-round", "frame", bad + "value", "LIMIT-16", pages(NONE, [(0, 0, 1)], [page(1)]))
    no("pages-run-count", "frame", bad + "count", "PAGES-2",
       pages(0, [(0, 0, 1)], [page(1)], run_count=2))
    no("zeros-count", "frame", bad + "count", "ZEROS-2", frame("ZEROS", zeros(0, [(0, 0, 3)], page_count=4)))
    no("zeros-count-under-runs", "frame", bad + "count", "ZEROS-2", frame("ZEROS", zeros(0, [(0, 0, 3)], page_count=2)))
    no("zeros-too-many", "frame", bad + "value", "ZEROS-2 LIMIT-15", frame("ZEROS", zeros(0, [(0, 0, NONE)] * 257)))
    no("zeros-none", "frame", bad + "table-bytes", "ZEROS-1", frame("ZEROS", zeros(0, [])))
    no("zeros-with-a-body", "frame", bad + "body-bytes", "ZEROS-1", frame("ZEROS", zeros(0, [(0, 0, 1)]), body=page(0)))
    no("credit-none", "frame", bad + "table-bytes", "CREDIT-1", frame("CREDIT", credit([])))
    no("credit-device", "frame", bad + "value", "LIMIT-8", frame("CREDIT", credit([(256, 1)])))
    no("sequence", "stream", "wire.misbehaved.sequence", "HEAD-8", frame("COMMIT", commit(1), sequence=1))
    no("zeros-empty-run", "frame", bad + "value", "RUN-2", frame("ZEROS", zeros(0, [(0, 0, 0)])))
    no("round_end-flags", "frame", bad + "reserved", "ROUND-4", frame("ROUND_END", round_end(0, 2, 0, 0)))
    no("round_end-pages", "frame", bad + "value", "LIMIT-15",
       frame("ROUND_END", round_end(0, 0, (1 << 40) + 1, 0)))
    no("device_chunk-empty", "frame", bad + "body-bytes", "DEVSTREAM-2", frame("DEVICE_CHUNK", device_chunk(0, 0, 0, 0)))
    no("device_chunk-section", "frame", bad + "value", "DEVSTREAM-2",
       frame("DEVICE_CHUNK", device_chunk(0, 2, 0, 0), body=b"x"))
    no("device_chunk-offset", "frame", bad + "value", "LIMIT-17",
       frame("DEVICE_CHUNK", device_chunk(0, 0, 0, 1 << 48), body=b"x"))
    no("device_mark-mark", "frame", bad + "value", "DEVSTREAM-3", frame("DEVICE_MARK", device_mark(0, 5, 0, 0, 0)))
    no("device_mark-generation", "frame", bad + "value", "DEVSTREAM-4",
       frame("DEVICE_MARK", device_mark(0, 1, 0, 0, 0)))
    no("ack-lane", "frame", bad + "value", "LIMIT-9", frame("ACK", ack([(256, 0, 1)])))
    no("ack-none", "frame", bad + "table-bytes", "ACK-1", frame("ACK", ack([])))
    no("ack-count", "frame", bad + "count", "ACK-1", frame("ACK", ack([(0, 0, 1)], count=NONE)))
    no("give_back-reason", "frame", bad + "value", "BACK-3", frame("GIVE_BACK", give_back(0, 0, 0, 2, [(0, 0, 1)])))
    no("give_back-pages", "frame", bad + "value", "BACK-3", frame("GIVE_BACK", give_back(0, 0, 0, 1, [(0, 0, 257)])))
    no("switchover_ack-generation", "frame", bad + "value", "SWACK-1",
       frame("SWITCHOVER_ACK", switchover_ack(0, 0, 1, 1)))
    no("keep_alive-stamp", "frame", bad + "value", "ALIVE-1", frame("KEEP_ALIVE", keep_alive(0, 1)))
    no("keep_alive-held-nothing", "frame", bad + "value", "ALIVE-4", frame("KEEP_ALIVE", keep_alive(1, 0, 1)))
    no("keep_alive-flags", "frame", bad + "reserved", "GEN-3", frame("KEEP_ALIVE", keep_alive(1, 0, 0, 3)))
    no("lane_down-reason", "frame", bad + "value", "REASON-1", frame("LANE_DOWN", lane_down(0, 0, 0)))
    no("final-no-memory", "frame", bad + "value", "FINAL-1", frame("FINAL", final(0, 0, 0, 0)))
    no("final-guest", "frame", bad + "value", "FINAL-6", frame("FINAL", final(0, 0, 0, 1, 2)))
    no("stream_open-stream", "frame", bad + "value", "LIMIT-18", frame("STREAM_OPEN", stream_open(1024)))
    no("stream_data-empty", "frame", bad + "body-bytes", "CARRY-5", frame("STREAM_DATA", stream_data(0, 0)))
    no("stream_data-offset", "frame", bad + "value", "LIMIT-19",
       frame("STREAM_DATA", stream_data(0, 1 << 56), body=b"x"))
    no("stream_credit-received", "frame", bad + "value", "CARRY-6", frame("STREAM_CREDIT", stream_credit([(0, 2, 1)])))
    no("stream_credit-count", "frame", bad + "count", "CARRY-6",
       frame("STREAM_CREDIT", stream_credit([(0, 0, 1)], count=2)))
    no("stream_end-how", "frame", bad + "value", "CARRY-8", frame("STREAM_END", stream_end(0, 3, 0)))
    no("stream_outcome-state", "frame", bad + "value", "CARRY-10", frame("STREAM_OUTCOME", outcome(5)))
    no("abort-text-bytes", "frame", bad + "count", "ABORT-1", frame("ABORT", abort(1, 2, 0, b"text", 3)))
    no("abort-control-character", "frame", bad + "text", "TEXT-1", frame("ABORT", abort(1, 2, 0, b"a\nb")))
    no("abort-direction", "frame", bad + "text", "TEXT-1", frame("ABORT", abort(1, 2, 0, "a\u202eb".encode())))
    no("abort-zero-width", "frame", bad + "text", "TEXT-1", frame("ABORT", abort(1, 2, 0, "a\u200bb".encode())))
    no("abort-unassigned", "frame", bad + "text", "TEXT-1", frame("ABORT", abort(1, 2, 0, "a\u2065b".encode())))
    no("abort-phase", "frame", bad + "value", "ABORT-1", frame("ABORT", abort(1, 8, 0, b"")))
    no("abort-channel", "frame", bad + "value", "ABORT-1", frame("ABORT", abort(1, 2, 257, b"")))
    no("abort-reason", "frame", bad + "value", "REASON-1", frame("ABORT", abort(0, 2, 0, b"")))
    no("landed-order", "frame", bad + "value", "LANDED-2", frame("LANDED", landed(1, [(1, 0, 1), (0, 0, 1)])))
    no("outcome-state", "frame", bad + "value", "ASK-2", frame("OUTCOME", outcome(0)))


def sessions():
    """A whole small migration, channel by channel: two regions, one device, one lane, two rounds."""
    first, second, last = page(0x11), page(0x22), page(0x33)
    live = term(0, 1, page_value(first)) + term(1, 16, page_value(second)) & MASK
    end = term(0, 1, page_value(last)) + term(1, 16, page_value(second)) & MASK
    one_device = [(0, 7, 4, 9, 1024, b"net0")]

    def stream(name, rules, frames):
        octets = Octets()
        for sequence, make in enumerate(frames):
            octets.join(make(sequence))
        write(name, "stream", "accept", rules.split(), octets)

    def plain(kind, table, body=b""):
        return lambda sequence: frame(kind, table, sequence, body)

    stream("session-control-source", "SETUP-1 SWITCH-1 STATE-1 FINAL-1 COMMIT-1 ALIVE-5 RUNNING-2", [
        plain("CONFIG", blob(blob_bytes=5), b"hello"), plain("REGIONS", regions()),
        plain("DEVICES", devices(one_device)), plain("SETUP_END", setup_end(1, 2, 1, 1)),
        plain("KEEP_ALIVE", keep_alive(5)), plain("SWITCHOVER", switchover(1)),
        plain("VM_STATE", blob(3, 1, 0, 0, 8), b"cpu-zero"), plain("FINAL", final(1, 1, end, 768)),
        plain("COMMIT", commit(end)), plain("KEEP_ALIVE", keep_alive(5005, 9000, 3, 0))])
    stream("session-control-destination", "READY-1 READY-2 ACK-1 CLOSED-1 CLOSED-4 PREP-1 RUNNING-1 RUNNING-2 ALIVE-4", [
        plain("GRANT", grant()), plain("READY", ready(1)), plain("KEEP_ALIVE", keep_alive(8000, 5, 2, 0)),
        plain("PROGRESS", progress(0, 0, 0, 900, 0, 1)),
        plain(0xFFFE, Octets().put(b"\x01\x02\x03", "what a later version put here"), b"later"),
        plain("SWITCHOVER_ACK", switchover_ack(0, 1, 4, 20)), plain("CREDIT", credit([(0, 33554436)])),
        plain("ACK", ack([(0, 0, 5)])), plain("ROUND_CLOSED", round_closed(0, 2, 766, live, 2500)),
        plain("DEVICE_LOADED", device_loaded(0, 8, 30, 5)), plain("ACK", ack([(0, 0, 11)])),
        plain("ROUND_CLOSED", round_closed(1, 1, 0, end, 300)), plain("PREPARED", prepared(end, 10, 20, 30)),
        plain("RUNNING", running(150, 7000, 769 * PAGE)), plain("KEEP_ALIVE", keep_alive(9000, 5, 1002))])
    stream("session-data", "PAGES-3 ZEROS-1 ROUND-3 DEVSTREAM-1", [
        lambda sequence: pages(0, [(0, 1, 1), (1, 16, 1)], [first, second], sequence),
        plain("ZEROS", zeros(0, [(0, 0, 1), (0, 2, 254), (1, 0, 16), (1, 17, 495)])),
        plain("DEVICE_CHUNK", device_chunk(0, 0, 0, 0), b"init"), plain("DEVICE_MARK", device_mark(0, 1, 1, 1, 4)),
        plain("ROUND_END", round_end(0, 0, 2, 766)),
        lambda sequence: pages(1, [(0, 1, 1)], [last], sequence),
        plain("DEVICE_CHUNK", device_chunk(0, 0, 2, 4), b"stop"), plain("DEVICE_MARK", device_mark(0, 2, 1, 3, 8)),
        plain("DEVICE_CHUNK", device_chunk(0, 1, 4, 8), b"c"), plain("DEVICE_MARK", device_mark(0, 3, 1, 5, 9)),
        plain("ROUND_END", round_end(1, 1, 1, 0))])


class Block:
    """What one side writes to one channel: a hello, a reply or a frame; or, of the mark "!", that the channel is lost."""

    def __init__(self, mark, side="", channel="", octets=None, kind=None, table=None, bodies=()):
        self.mark, self.side, self.channel = mark, side, channel
        self.octets, self.kind, self.table, self.bodies = octets, kind, table, list(bodies)
        self.sequence = None

    def is_hello(self):
        return self.octets is not None

    def copy(self):
        twin = copy.deepcopy(self)
        twin.sequence = None
        return twin

    def set(self, nth=0, **fields):
        """Changes fields by name, the nth of each; the checksums follow."""
        octets = self.octets or self.table
        for name, value in fields.items():
            places = [at for at, (_, remark) in enumerate(octets.lines) if remark.split(" = ")[0] in (name, "run." + name)]
            raw, remark = octets.lines[places[nth]]
            if isinstance(value, bytes):
                octets.lines[places[nth]] = (value, remark)
            else:
                shown = f"{value:#0{2 + 2 * len(raw)}x}" if " = 0x" in remark else value
                octets.lines[places[nth]] = (value.to_bytes(len(raw), "little"), f"{remark.split(' = ')[0]} = {shown}")
        if self.octets:
            crc = zlib.crc32(b"".join(raw for raw, _ in octets.lines[:-1]))
            octets.lines[-1] = (struct.pack("<I", crc), f"crc = {crc:#010x}")
        return self

    def field(self, name, nth=0):
        octets = self.octets or self.table
        found = [raw for raw, remark in octets.lines if remark.split(" = ")[0] in (name, "run." + name)]
        return int.from_bytes(found[nth], "little")


class Talk:
    """A session of several channels, in an order in which it can have happened. Frames are numbered when it is written."""

    def __init__(self, name, rules, what, expect="accept"):
        self.name, self.rules, self.what, self.expect = name, rules, what, expect
        self.blocks = []

    def frame(self, side, channel, kind, table, body=b""):
        self.blocks.append(said(side, channel, kind, table, body))
        return self

    def pages(self, channel, round_number, entries, contents, mark=">", arrive=None):
        self.blocks.append(said_pages(channel, round_number, entries, contents, mark, arrive))
        return self

    def open(self, channel, hello_octets, reply_octets):
        self.blocks += [Block(">", "source", channel, hello_octets), Block(">", "destination", channel, reply_octets)]
        return self

    def close(self, channel):
        self.blocks.append(Block("!", channel=channel))
        return self

    def set_up(self, control, lanes, table=(), ticket=TICKET, features=3, incarnation=0):
        self.frame("destination", control, "GRANT", grant(ticket=ticket))
        self.frame("source", control, "CONFIG", blob(blob_bytes=5), b"hello")
        self.frame("source", control, "REGIONS", regions(SMALL)).frame("source", control, "DEVICES", devices(table))
        self.frame("source", control, "SETUP_END", setup_end(1, 1, len(table), lanes, 8 * PAGE))
        for lane in range(lanes):
            self.join(lane, incarnation, ticket, features)
        return self.frame("destination", control, "READY", ready(lanes, 300 if incarnation else 4000))

    def join(self, lane, incarnation=0, ticket=TICKET, features=3):
        return self.open(f"lane-{lane}-{incarnation}", hello(2, ticket, lane=lane, incarnation=incarnation, channel=1,
                                                             mandatory=features, optional=0), hello_reply(features=features))

    def sent(self, channel):
        """How many frames the source has sent on a channel."""
        return sum(block.channel == channel and block.side == "source" and not block.is_hello() for block in self.blocks)

    def to_the_end(self, control, lanes, round_number, region_page, content, digest, pages_so_far):
        """The paused round with one page on the first lane, and the commit."""
        self.frame("source", control, "SWITCHOVER", switchover(round_number))
        self.frame("source", control, "VM_STATE", blob(3, 1, 0, 0, 8), b"cpu-zero")
        self.pages(lanes[0], round_number, [(0, region_page, 1)], [content])
        for place, lane in enumerate(lanes):
            self.frame("source", lane, "ROUND_END", round_end(round_number, 1, 0 if place else 1, 0))
        self.frame("source", control, "FINAL", final(round_number, 1, digest, 8))
        marks = [(int(lane.split("-")[1]), int(lane.split("-")[2]), self.sent(lane)) for lane in lanes]
        self.frame("destination", control, "ACK", ack(marks))
        self.frame("destination", control, "ROUND_CLOSED", round_closed(round_number, 1, 0, digest, 700))
        self.frame("destination", control, "PREPARED", prepared(digest, 10, 20, 30))
        self.frame("source", control, "COMMIT", commit(digest))
        return self

    def running(self, control, pages_landed):
        self.frame("destination", control, "RUNNING", running(150, 7000, pages_landed * PAGE))
        self.frame("destination", control, "KEEP_ALIVE", keep_alive(900000))
        return self.frame("source", control, "KEEP_ALIVE", keep_alive(800000, 900000, 4, 0))

    # What the illegal sessions are made with.

    def find(self, kind, nth=0, channel=None):
        """The place of the nth frame of a kind, or of a hello or reply."""
        def is_it(block):
            if channel not in (None, block.channel) or block.mark == "!":
                return False
            if kind in ("hello", "reply"):
                return block.is_hello() and (block.side == "source") == (kind == "hello")
            return block.kind == kind
        return [at for at, block in enumerate(self.blocks) if is_it(block)][nth]

    def get(self, kind, nth=0, channel=None):
        return self.blocks[self.find(kind, nth, channel)]

    def until(self, kind, nth=0, channel=None):
        """Ends the session with this block, and gives it."""
        at = self.find(kind, nth, channel)
        del self.blocks[at + 1:]
        return self.blocks[at]

    def drop(self, kind, nth=0, channel=None):
        return self.blocks.pop(self.find(kind, nth, channel))

    def then(self, *blocks):
        """One more thing is said."""
        self.blocks += blocks
        return self

    def write(self):
        text = [f"name: {self.name}", "structure: session", f"expect: {self.expect}", f"spec: {self.rules}", "blocks:",
                f"; {self.what}"]
        sequences = {}
        for block in self.blocks:
            if block.mark == "!":
                text.append(f"! {block.channel} is lost")
                continue
            text.append(f"{block.mark} {block.side} {block.channel}")
            way = block.side, block.channel
            octets = block.octets
            if octets is None:
                sequence = sequences.get(way, 0) if block.sequence is None else block.sequence
                sequences[way] = sequence + 1
                octets = frame(block.kind, block.table, sequence, b"".join(block.bodies), bodies=block.bodies)
            elif block.side == "source":
                sequences[way] = sequences["destination", block.channel] = 0
            for raw, remark in octets.lines:
                text += show(raw, remark)
        (HERE / f"{self.name}.txt").write_text("\n".join(text) + "\n")
        return self


def said(side, channel, kind, table, body=b""):
    return Block(">", side, channel, kind=kind, table=table, bodies=[body] if body else [])


def said_pages(channel, round_number, entries, contents, mark=">", arrive=None):
    """A PAGES frame; `arrive`: what comes in the place of the contents."""
    return Block(mark, "source", channel, kind="PAGES", table=pages_table(round_number, entries, contents), bodies=arrive or contents)


SMALL = [(0, 0x100000, 8 * PAGE)]


def talks():
    """Whole sessions of one region of eight pages, each of another shape."""
    one, two, three = page(0x11), page(0x22), page(0x33)
    v = lambda number, content: term(0, number, page_value(content))
    base = v(0, one) + v(1, two) & MASK
    done = base + v(5, three) & MASK

    def begin(name, rules, what, lanes=2, table=(), features=3):
        talk = Talk(name, rules, what)
        talk.open("control-0", hello(optional=features), hello_reply(features=features))
        return talk.set_up("control-0", lanes, table, features=features)

    def round_zero(talk, control="control-0", lanes=("lane-0-0", "lane-1-0")):
        talk.pages(lanes[0], 0, [(0, 0, 2)], [one, two])
        talk.frame("source", lanes[1], "ZEROS", zeros(0, [(0, 2, 6)]))
        talk.frame("source", lanes[0], "ROUND_END", round_end(0, 0, 2, 0))
        talk.frame("source", lanes[1], "ROUND_END", round_end(0, 0, 0, 6))
        talk.frame("destination", control, "ACK", ack([(0, 0, 2), (1, 0, 2)]))
        return talk.frame("destination", control, "ROUND_CLOSED", round_closed(0, 2, 6, base, 900))

    plain = round_zero(begin("session-plain", "SETUP-1 JOIN-1 JOIN-5 JOIN-6 ROUND-1 ROUND-3 ROUND-5 CLOSED-1 CLOSED-3 SWITCH-1 "
                             "FINAL-1 FINAL-3 PREP-1 COMMIT-1 COMMIT-2 RUNNING-1 RUNNING-2 DIGEST-3 DIGEST-6 FEAT-4",
                             "two lanes, two rounds, no device"))
    plain.to_the_end("control-0", ["lane-0-0", "lane-1-0"], 1, 5, three, done, 8).running("control-0", 9).write()

    lost = begin("session-lane-lost", "LANE-1 LANE-2 LANE-3 LANE-5 ROUND-6 JOIN-3 ACK-1 CLOSED-2",
                 "lane 1 is lost in round 0 with a frame that was not acknowledged, and comes back in round 1")
    lost.pages("lane-0-0", 0, [(0, 0, 1)], [one]).pages("lane-1-0", 0, [(0, 1, 1)], [two], "?").close("lane-1-0")
    lost.frame("destination", "control-0", "LANE_DOWN", lane_down(1, 0, 18))
    lost.frame("source", "control-0", "LANE_DOWN", lane_down(1, 0, 18))
    lost.frame("source", "lane-0-0", "ZEROS", zeros(0, [(0, 2, 6)]))
    lost.frame("source", "lane-0-0", "ROUND_END", round_end(0, 0, 1, 6))
    lost.frame("destination", "control-0", "ACK", ack([(0, 0, 3)]))
    lost.frame("destination", "control-0", "ROUND_CLOSED", round_closed(0, 1, 6, v(0, one), 900))
    lost.join(1, 1)
    lost.pages("lane-1-1", 1, [(0, 1, 1)], [two]).frame("source", "lane-1-1", "ROUND_END", round_end(1, 0, 1, 0))
    lost.frame("source", "lane-0-0", "ROUND_END", round_end(1, 0, 0, 0))
    lost.frame("destination", "control-0", "ACK", ack([(0, 0, 4), (1, 1, 2)]))
    lost.frame("destination", "control-0", "ROUND_CLOSED", round_closed(1, 1, 0, base, 500))
    lost.to_the_end("control-0", ["lane-0-0", "lane-1-1"], 2, 5, three, done, 8).running("control-0", 9).write()

    damaged = begin("session-page-damaged", "BACK-1 BACK-2 BACK-3 PAGES-6 CLOSED-2 DIGEST-6 ACK-1",
                    "page 1 arrives with other octets than its checksum says, is given back, and is sent again", 1)
    damaged.pages("lane-0-0", 0, [(0, 0, 1)], [one])
    damaged.pages("lane-0-0", 0, [(0, 1, 1)], [two], arrive=[three])
    damaged.frame("source", "lane-0-0", "ZEROS", zeros(0, [(0, 2, 6)]))
    damaged.frame("source", "lane-0-0", "ROUND_END", round_end(0, 0, 2, 6))
    damaged.frame("destination", "control-0", "GIVE_BACK", give_back(0, 0, 1, 1, [(0, 1, 1)]))
    damaged.frame("destination", "control-0", "ACK", ack([(0, 0, 4)]))
    wrong = v(0, one) + v(1, three) & MASK
    damaged.frame("destination", "control-0", "ROUND_CLOSED", round_closed(0, 1, 6, wrong, 900, 1))
    damaged.to_the_end("control-0", ["lane-0-0"], 1, 1, two, base, 8).running("control-0", 8).write()

    device = [(0, 15, 4, 9, 1024, b"net0")]
    devs = begin("session-devices", "DEVSTREAM-1 DEVSTREAM-3 DEVSTREAM-4 DEVSTREAM-5 DEVSTREAM-7 DEVSTREAM-8 DEVSTREAM-9 SWACK-1 SWACK-3 "
                 "LOADED-1 CREDIT-1 CREDIT-2", "one device on two lanes: initial bytes, a restart, and again to the end", 2, device)
    devs.frame("source", "lane-0-0", "DEVICE_CHUNK", device_chunk(0, 0, 0, 0), b"init")
    devs.frame("source", "lane-1-0", "DEVICE_MARK", device_mark(0, 1, 1, 1, 4))
    devs.frame("destination", "control-0", "SWITCHOVER_ACK", switchover_ack(0, 1, 4, 20))
    devs.frame("destination", "control-0", "CREDIT", credit([(0, 33554436)]))
    devs.frame("source", "lane-1-0", "DEVICE_MARK", device_mark(0, 4, 1, 2, 4))
    devs.frame("source", "lane-0-0", "DEVICE_CHUNK", device_chunk(0, 0, 3, 4), b"again")
    devs.frame("source", "lane-1-0", "DEVICE_MARK", device_mark(0, 1, 2, 4, 9))
    devs.frame("destination", "control-0", "SWITCHOVER_ACK", switchover_ack(0, 2, 5, 20))
    devs.pages("lane-0-0", 0, [(0, 0, 2)], [one, two])
    devs.frame("source", "lane-1-0", "ZEROS", zeros(0, [(0, 2, 6)]))
    devs.frame("source", "lane-0-0", "ROUND_END", round_end(0, 0, 2, 0))
    devs.frame("source", "lane-1-0", "ROUND_END", round_end(0, 0, 0, 6))
    devs.frame("destination", "control-0", "ACK", ack([(0, 0, 4), (1, 0, 5)]))
    devs.frame("destination", "control-0", "ROUND_CLOSED", round_closed(0, 2, 6, base, 900))
    # The second lane overtakes the first: items are put in order by their index.
    devs.frame("source", "lane-1-0", "DEVICE_MARK", device_mark(0, 2, 2, 6, 13))
    devs.frame("source", "lane-0-0", "DEVICE_CHUNK", device_chunk(0, 0, 5, 9), b"stop")
    devs.frame("source", "lane-0-0", "DEVICE_CHUNK", device_chunk(0, 1, 7, 13), b"c")
    devs.frame("source", "lane-0-0", "DEVICE_MARK", device_mark(0, 3, 2, 8, 14))
    devs.to_the_end("control-0", ["lane-0-0", "lane-1-0"], 1, 5, three, done, 8)
    devs.running("control-0", 9).write()

    again = round_zero(begin("session-resume", "RESUME-1 RESUME-2 RESUME-5 RESUME-6 RESUME-7 RESUME-9 RESUME-10 RESUME-14 LANDED-1 LANDED-2 "
                             "GRANT-1 READY-2", "the control channel is lost in round 1, in which page 5 landed and page 6 did not"))
    again.pages("lane-0-0", 1, [(0, 5, 1)], [three]).pages("lane-1-0", 1, [(0, 6, 1)], [three], "?").close("control-0").close("lane-0-0").close("lane-1-0")
    new = bytes(range(0x50, 0x60))
    again.open("control-1", hello(3, SECRET, mandatory=3, optional=0), hello_reply())
    again.set_up("control-1", 2, ticket=new, incarnation=1)
    again.frame("destination", "control-1", "LANDED", landed(1, [(0, 0, 3), (1, 0, 2)]))
    again.pages("lane-1-1", 1, [(0, 6, 1)], [three])
    again.frame("source", "lane-0-1", "ROUND_END", round_end(1, 0, 0, 0))
    again.frame("source", "lane-1-1", "ROUND_END", round_end(1, 0, 1, 0))
    again.frame("destination", "control-1", "ACK", ack([(0, 1, 1), (1, 1, 2)]))
    most = done + v(6, three) & MASK
    again.frame("destination", "control-1", "ROUND_CLOSED", round_closed(1, 2, 0, most, 900))
    again.to_the_end("control-1", ["lane-0-1", "lane-1-1"], 2, 7, three, most + v(7, three) & MASK, 8)
    again.running("control-1", 11).write()

    asked = round_zero(begin("session-ask", "ASK-1 ASK-2 ASK-4 COMMIT-3 COMMIT-4 COMMIT-5", "the control channel is lost behind COMMIT"))
    asked.to_the_end("control-0", ["lane-0-0", "lane-1-0"], 1, 5, three, done, 8).close("control-0")
    asked.open("control-1", hello(4, SECRET, optional=0), hello_reply(features=0))
    asked.frame("destination", "control-1", "OUTCOME", outcome(3)).write()

    ended = round_zero(begin("session-abort", "ABORT-1 ABORT-2 ABORT-3", "the user of the source cancels in round 1"))
    ended.frame("source", "control-0", "ABORT", abort(1, 2, NONE, b"cancelled")).write()

    setup = Talk("session-lane-lost-in-set-up", "LANE-1 LANE-2 LANE-10 JOIN-3 SETUP-1 READY-1", "lane 0 is lost before READY and dialled again")
    setup.open("control-0", hello(), hello_reply()).frame("destination", "control-0", "GRANT", grant())
    setup.frame("source", "control-0", "REGIONS", regions(SMALL)).frame("source", "control-0", "DEVICES", devices([]))
    setup.frame("source", "control-0", "SETUP_END", setup_end(0, 1, 0, 1, 8 * PAGE)).join(0).close("lane-0-0")
    setup.frame("destination", "control-0", "LANE_DOWN", lane_down(0, 0, 18))
    setup.frame("source", "control-0", "LANE_DOWN", lane_down(0, 0, 18)).join(0, 1)
    setup.frame("destination", "control-0", "READY", ready(1, 4000))
    setup.frame("source", "control-0", "ABORT", abort(1, 2, NONE, b"cancelled")).write()

    refused = Talk("session-refusals", "VER-3 HELLO-3 FEAT-1 FEAT-3 HELLO-10 REPLY-3 JOIN-1 RESUME-1", "what is refused in a reply, channel by channel")
    no = lambda reason, text, session=SESSION: hello_reply(0, 1, reason, 0, session=session, text=text)
    refused.open("control-0", hello(versions=(2, 9)), no(13, b"no version in common"))
    refused.open("control-1", hello(mandatory=1 << 40, optional=0), no(14, b"feature 40 is not offered"))
    refused.open("control-2", hello(crc=0), no(20, b"wrong checksum", bytes(16)))
    refused.open("control-3", hello(session=bytes(16)), no(2, b"no session", bytes(16)))
    refused.open("control-4", hello(3, SECRET, mandatory=3, optional=0), no(15, b"no such session"))
    refused.open("lane-0-0", hello(2, TICKET, channel=1, mandatory=3, optional=0), no(15, b"no such session"))
    refused.open("control-5", hello(versions=(2, 9), role=7, reserved=1), no(13, b"no version in common"))
    refused.write()
    return {"plain": plain, "lane-lost": lost, "page-damaged": damaged, "devices": devs, "resume": again, "ask": asked, "abort": ended}


def illegal(legal):
    """Sessions that break a rule with their last block. Each is a legal one, changed in one place.

    `reason-N`: whoever reads the last block has to refuse it with that reason. `kept`: the writer may not do it, and nobody has to find out."""
    one, two, three = page(0x11), page(0x22), page(0x33)
    v = lambda number, content: term(0, number, page_value(content))
    base = v(0, one) + v(1, two) & MASK

    def bad(name, expect, rules, what, edit, of="plain"):
        talk = copy.deepcopy(legal[of])
        talk.name, talk.rules, talk.expect = f"illegal-{name}", rules, expect
        talk.what = f"{legal[of].name}, changed: {what}"
        edit(talk)
        talk.write()

    control = "control-0"
    own = lambda kind, table, body=b"": said("source", control, kind, table, body)
    theirs = lambda kind, table, channel=control: said("destination", channel, kind, table)

    def features(talk, agreed):
        """As if the session had been begun with these features."""
        for block in talk.blocks:
            if block.is_hello() and block.side == "source":
                block.set(**{"features_optional" if block.channel == control else "features_mandatory": agreed})
            elif block.is_hello():
                block.set(features=agreed)

    # --- hello, reply, joining
    bad("reply-another-session", "reason-15", "REPLY-5", "the reply names another session",
        lambda t: t.until("reply").set(session=bytes(range(0x11, 0x21))))
    bad("reply-version-not-offered", "reason-13", "REPLY-5", "the reply chooses version 2", lambda t: t.until("reply").set(version=2))
    bad("reply-feature-not-asked", "reason-14", "REPLY-6", "the reply agrees to feature 5", lambda t: t.until("reply").set(features=0x23))

    def lane_zero(t, **fields):
        t.until("reply", channel="lane-0-0")
        return t.get("hello", channel="lane-0-0").set(**fields)

    def fewer_features(t):
        lane_zero(t, features_mandatory=1, features_optional=2)
        t.get("reply", channel="lane-0-0").set(features=1)

    bad("join-reply-other-features", "reason-14", "JOIN-2", "the reply on lane 0 agrees to less than the session", fewer_features)
    bad("join-wrong-ticket", "reason-16", "JOIN-1", "lane 0 shows another ticket and is accepted", lambda t: lane_zero(t, token=SECRET))

    def renamed(t, old, new, **fields):
        for kind in ("hello", "reply"):
            t.get(kind, channel=old).channel = new
        t.get("hello", channel=new).set(**fields)
        t.until("reply", channel=new)

    bad("join-lane-past-lanes", "reason-3", "JOIN-5", "lane 2 joins a session of two lanes and is accepted",
        lambda t: renamed(t, "lane-1-0", "lane-2-0", lane=2))
    bad("join-lane-past-the-grant", "reason-17", "JOIN-1", "lane 16 joins a session of which 16 lanes were granted and is accepted",
        lambda t: renamed(t, "lane-1-0", "lane-16-0", lane=16))
    bad("join-first-incarnation-1", "reason-3", "JOIN-1", "the first incarnation of lane 1 is 1, and is accepted",
        lambda t: renamed(t, "lane-1-0", "lane-1-1", incarnation=1))
    bad("join-before-setup-end", "kept", "JOIN-5", "lane 0 is answered before SETUP_END was sent",
        lambda t: (t.drop("SETUP_END"), t.until("reply", channel="lane-0-0")))
    bad("dialled-again-too-early", "kept", "LANE-5", "lane 1 is dialled again before the source has said LANE_DOWN",
        lambda t: (t.drop("LANE_DOWN", 1), t.until("reply", channel="lane-1-1")), "lane-lost")
    def twice(t):
        t.until("reply", channel="lane-1-1").channel = "lane-1-0"
        t.get("hello", channel="lane-1-1").set(incarnation=0).channel = "lane-1-0"

    bad("lane-twice", "reason-3", "JOIN-1", "lane 1 comes back with incarnation 0 again and is accepted",
        twice, "lane-lost")
    bad("incarnation-skipped", "kept", "JOIN-3", "lane 1 comes back with incarnation 2",
        lambda t: renamed(t, "lane-1-1", "lane-1-2", incarnation=2), "lane-lost")

    # --- set-up
    def wrong_number(t):
        t.until("CONFIG").sequence = 1

    bad("sequence", "reason-3", "HEAD-8", "the first frame of the source has the sequence 1", wrong_number)

    def swapped(t, kind, other):
        """The frame comes after the other one, which ends it."""
        t.blocks.insert(t.find(other) + 1, t.drop(kind))
        t.until(kind)

    bad("grant-twice", "reason-3", "SETUP-1", "GRANT is said twice",
        lambda t: (t.until("GRANT"), t.then(t.get("GRANT").copy().set(ticket=SECRET[::-1]))))
    bad("devices-before-regions", "reason-3", "SETUP-1", "DEVICES stands before REGIONS",
        lambda t: (t.drop("REGIONS"), t.until("DEVICES")))
    bad("config-after-regions", "reason-3", "SETUP-1", "CONFIG stands behind REGIONS", lambda t: swapped(t, "CONFIG", "REGIONS"))
    for name, what, fields in [("counts", "two blobs where there is one", {"configs": 2}), ("memory", "one page more", {"memory_bytes": 9 * PAGE}),
                               ("lanes", "17 lanes where 16 are granted", {"lanes": 17})]:
        bad("setup-end-" + name, "reason-3", "SETUP-2", f"SETUP_END says {what}", lambda t: t.until("SETUP_END").set(**fields))
    one_device = devices([(0, 15, 4, 9, 1024, b"net0")])

    def device_without_feature(t):
        features(t, 2)
        t.until("DEVICES").table = one_device

    bad("devices-without-feature", "reason-3", "FEAT-4", "DEVICE_STATE was not agreed on, and DEVICES has an entry", device_without_feature)
    bad("device-past-the-window", "reason-10", "DEVICE-3", "the window is shorter than a chunk of the device",
        lambda t: (t.get("GRANT").set(device_window_bytes=65536), t.until("DEVICES").set(chunk_bytes_max=65537)), "devices")
    bad("suspend-without-resume", "kept", "FEAT-5", "RESUME was not agreed on, and GRANT has suspend_ms",
        lambda t: (features(t, 1), t.until("GRANT")))

    def two_parts(t, **fields):
        config = t.until("CONFIG")
        config.table, config.bodies = blob(blob_bytes=MIB + 1), [bytes(MIB)]
        t.then(own("CONFIG", blob(**{"part": 1, "blob_bytes": MIB + 1, **fields}), b"x"))

    bad("blob-changes", "reason-3", "BLOB-4", "the second part of a blob has another version", lambda t: two_parts(t, version=3))
    bad("blob-part-missing", "reason-3", "BLOB-2", "a blob begins with its second part",
        lambda t: (two_parts(t), t.drop("CONFIG")))
    bad("blob-index-skipped", "reason-3", "BLOB-2", "the first blob has the index 1", lambda t: t.until("CONFIG").set(index=1))
    bad("ready-lanes", "reason-3", "READY-1", "READY says one lane where two have joined", lambda t: t.until("READY").set(lanes=1))
    bad("pages-before-ready", "kept", "JOIN-6 KIND-2", "PAGES on lane 0 before READY", lambda t: (t.drop("READY"), t.until("PAGES")))
    bad("give-back-in-set-up", "reason-3", "RESUME-10", "GIVE_BACK before READY of a start",
        lambda t: (t.until("READY"), t.drop("READY"), t.then(theirs("GIVE_BACK", give_back(0, 0, 0, 1, [(0, 0, 1)])))))
    bad("lane-down-unknown", "reason-3", "LANE-2", "LANE_DOWN of lane 5, which never was",
        lambda t: (t.until("READY"), t.then(theirs("LANE_DOWN", lane_down(5, 0, 18)))))

    # --- kinds
    bad("ack-from-source", "reason-3", "KIND-1", "the source says ACK", lambda t: (t.until("READY"), t.then(own("ACK", ack([(0, 0, 0)])))))

    def on_control(t):
        misled = t.get("PAGES").copy()
        misled.channel = control
        t.until("READY")
        t.then(misled)

    bad("pages-on-control", "reason-3", "KIND-1", "PAGES on the control channel", on_control)
    bad("destination-on-lane", "kept", "CHAN-2 KIND-1", "the destination says KEEP_ALIVE on lane 0",
        lambda t: (t.until("READY"), t.then(theirs("KEEP_ALIVE", keep_alive(5), "lane-0-0"))))
    chunk = lambda channel, *place, body=b"init": said("source", channel, "DEVICE_CHUNK", device_chunk(*place), body)
    bad("chunk-without-feature", "reason-3", "FEAT-4", "DEVICE_STATE was not agreed on, and DEVICE_CHUNK is sent",
        lambda t: (features(t, 2), t.until("READY"), t.then(chunk("lane-0-0", 0, 0, 0, 0))))

    # --- rounds
    bad("run-region", "reason-3", "RUN-1", "a run of region 1 where there is one region", lambda t: t.until("PAGES").set(region=1))
    bad("run-past-region", "reason-3", "RUN-3", "a run ends one page past the region", lambda t: t.until("ZEROS").set(first=3))
    again = lambda round_number, number, channel="lane-0-0": said_pages(channel, round_number, [(0, number, 1)], [three])
    mark = lambda channel, *says: said("source", channel, "ROUND_END", round_end(*says))
    bad("page-twice-in-a-round", "kept", "ROUND-2", "lane 0 sends page 2, which lane 1 has sent as zeros in the same round",
        lambda t: (t.until("ZEROS"), t.then(again(0, 2))))
    bad("round-end-counts", "reason-3", "ROUND-5", "ROUND_END says one page more than were sent", lambda t: t.until("ROUND_END").set(pages=3))
    bad("round-end-twice", "reason-3", "ROUND-8", "lane 0 ends round 0 twice", lambda t: (t.until("ROUND_CLOSED"), t.then(mark("lane-0-0", 0, 0, 0, 0))))
    bad("page-of-a-closed-round", "reason-3", "ROUND-8", "PAGES of round 0 when round 0 is closed",
        lambda t: (t.until("ROUND_CLOSED"), t.then(again(0, 3))))
    bad("page-of-a-later-round", "reason-3", "ROUND-8 ROUND-1", "PAGES of round 1 in round 0", lambda t: t.until("PAGES").set(round=1))
    bad("read-behind-the-fence", "kept", "ROUND-3", "a frame of round 1 is read before round 0 is closed",
        lambda t: (t.until("ROUND_END"), t.then(again(1, 3))))
    bad("flags-differ", "reason-3", "ROUND-4", "lane 1 ends the last round without bit 0", lambda t: t.until("ROUND_END", 3).set(flags=0))
    bad("paused-without-switchover", "kept", "ROUND-4", "bit 0 in a round that no SWITCHOVER names", lambda t: t.until("ROUND_END").set(flags=1))

    def without_a_lane(t):
        t.drop("ROUND_END", 0, "lane-1-0")
        t.get("ACK").set(1, frames=1)
        t.until("ROUND_CLOSED")

    bad("closed-before-a-lane", "kept", "CLOSED-1", "ROUND_CLOSED although lane 1 has not ended the round", without_a_lane)
    bad("closed-digest", "kept", "CLOSED-1 DIGEST-3", "one bit of the digest of ROUND_CLOSED", lambda t: t.until("ROUND_CLOSED").set(digest=base ^ 1))
    bad("closed-pages", "kept", "CLOSED-1", "ROUND_CLOSED counts one page of zeros too few", lambda t: t.until("ROUND_CLOSED").set(zero_pages=5))
    bad("closed-damaged", "kept", "CLOSED-2", "damaged_pages is 0 where one page is damaged",
        lambda t: t.until("ROUND_CLOSED").set(damaged_pages=0), "page-damaged")
    bad("closed-without-ack", "kept", "CLOSED-3", "ROUND_CLOSED before the ACK", lambda t: (t.drop("ACK"), t.until("ROUND_CLOSED")))

    # --- acknowledgements, lanes
    bad("ack-more-than-sent", "reason-3", "ACK-3", "ACK covers 9 frames of a lane that has sent 2", lambda t: t.until("ACK").set(frames=9))
    bad("ack-of-no-lane", "reason-3", "ACK-3", "ACK names lane 7", lambda t: t.until("ACK").set(1, lane=7))
    bad("ack-falls", "reason-3", "ACK-1", "the second ACK says one frame where the first said two", lambda t: t.until("ACK", 1).set(frames=1))
    bad("not-given-back", "kept", "BACK-2", "ACK of a frame with a damaged page that was not given back",
        lambda t: (t.drop("GIVE_BACK"), t.until("ACK")), "page-damaged")
    bad("give-back-after-ack", "kept", "BACK-3", "GIVE_BACK is said once more behind the ACK",
        lambda t: (t.until("ACK"), t.then(t.get("GIVE_BACK").copy())), "page-damaged")
    bad("give-back-other-frame", "kept", "BACK-3", "GIVE_BACK of a page that the frame does not hold",
        lambda t: t.until("GIVE_BACK").set(first=6), "page-damaged")
    bad("give-back-no-pages-frame", "kept", "BACK-3", "GIVE_BACK of the ROUND_END", lambda t: t.until("GIVE_BACK").set(sequence=3), "page-damaged")
    bad("give-back-landed", "kept", "BACK-1", "GIVE_BACK of a page that has landed",
        lambda t: t.until("GIVE_BACK").set(sequence=0, first=0), "page-damaged")
    bad("give-back-no-lane", "reason-3", "BACK-3", "GIVE_BACK names lane 7", lambda t: t.until("GIVE_BACK").set(lane=7), "page-damaged")
    bad("give-back-past-region", "reason-3", "RUN-3 BACK-3", "GIVE_BACK of a page past the region",
        lambda t: t.until("GIVE_BACK").set(first=8), "page-damaged")

    def used_after_down(t):
        t.until("LANE_DOWN", 1)
        t.then(theirs("LANE_DOWN", lane_down(0, 0, 18)), own("LANE_DOWN", lane_down(0, 0, 18)), again(0, 7))

    bad("lane-used-after-down", "kept", "LANE-1 LANE-2", "lane 0 carries on after both sides have said LANE_DOWN", used_after_down, "lane-lost")

    # --- devices
    bad("chunk-no-device", "reason-3", "DEVSTREAM-2", "DEVICE_CHUNK of device 1 of one device", lambda t: t.until("DEVICE_CHUNK").set(device=1), "devices")
    bad("chunk-offset", "reason-3", "DEVSTREAM-2", "the second chunk has the offset 5 instead of 4", lambda t: t.until("DEVICE_CHUNK", 1).set(offset=5), "devices")

    def long_chunk(t):
        t.until("DEVICE_CHUNK").bodies = [bytes(1025)]

    bad("chunk-too-long", "reason-3", "DEVSTREAM-2", "a chunk of 1025 octets of a device that said 1024", long_chunk, "devices")
    bad("configuration-before-data-end", "reason-3", "DEVSTREAM-3", "the first chunk is of section 1", lambda t: t.until("DEVICE_CHUNK").set(section=1), "devices")
    bad("generation-skipped", "reason-3", "DEVSTREAM-4", "the first INITIAL_END has generation 2", lambda t: t.until("DEVICE_MARK").set(generation=2), "devices")

    bad("initial-end-without-pre-copy", "kept", "DEVSTREAM-10", "INITIAL_END of a device without PRE_COPY",
        lambda t: (t.get("DEVICES").set(flags=2, initial_bytes=0), t.until("DEVICE_MARK")), "devices")

    def small_window(t):
        t.get("GRANT").set(device_window_bytes=1024)
        t.until("DEVICE_CHUNK")
        t.then(chunk("lane-1-0", 0, 0, 1, 4, body=bytes(1024)))

    bad("past-the-credit", "reason-3", "CREDIT-3", "a chunk ends at 1028 of a window of 1024", small_window, "devices")

    def item_twice(t):
        item = t.until("DEVICE_CHUNK").copy()
        item.channel = "lane-1-0"
        t.then(item)

    bad("item-twice", "reason-3", "DEVSTREAM-1", "the first chunk comes again although no lane was lost", item_twice, "devices")
    bad("credit-no-device", "reason-3", "CREDIT-1", "CREDIT names device 1 of one device", lambda t: t.until("CREDIT").set(device=1), "devices")
    bad("credit-falls", "reason-3", "CREDIT-2", "CREDIT says less than the GRANT", lambda t: t.until("CREDIT").set(offset_max=100), "devices")
    bad("ack-of-no-generation", "reason-3", "SWACK-1", "SWITCHOVER_ACK of generation 2 when 1 was announced",
        lambda t: t.until("SWITCHOVER_ACK").set(generation=2), "devices")
    bad("switchover-ack-no-device", "reason-3", "SWACK-1", "SWITCHOVER_ACK names device 1 of one device",
        lambda t: t.until("SWITCHOVER_ACK").set(device=1), "devices")
    bad("switchover-ack-twice", "reason-3", "SWACK-1", "SWITCHOVER_ACK of generation 1 again",
        lambda t: (t.until("SWITCHOVER_ACK"), t.then(t.get("SWITCHOVER_ACK").copy())), "devices")
    bad("loaded-no-device", "reason-3", "LOADED-1", "DEVICE_LOADED names device 1 of one device",
        lambda t: (t.until("CREDIT"), t.then(theirs("DEVICE_LOADED", device_loaded(1, 4, 5, 6)))), "devices")
    bad("loaded-too-early", "kept", "LOADED-1", "DEVICE_LOADED before CONFIG_END",
        lambda t: (t.until("CREDIT"), t.then(theirs("DEVICE_LOADED", device_loaded(0, 4, 5, 6)))), "devices")
    bad("switchover-without-ack", "kept", "SWACK-2", "SWITCHOVER although generation 2 is not acknowledged",
        lambda t: (t.drop("SWITCHOVER_ACK", 1), t.until("SWITCHOVER")), "devices")
    bad("final-before-config-end", "reason-3", "DEVSTREAM-7 DEVSTREAM-8 FINAL-2", "FINAL without the device's CONFIG_END",
        lambda t: (t.drop("DEVICE_MARK", 4), t.until("FINAL")), "devices")

    # --- switchover and commit
    bad("switchover-of-a-closed-round", "reason-3", "SWITCH-1", "SWITCHOVER names round 0, which is closed", lambda t: t.until("SWITCHOVER").set(final_round=0))
    bad("switchover-skips-a-round", "reason-3", "SWITCH-1 SWITCH-2", "the second SWITCHOVER names round 3 behind round 1",
        lambda t: (t.until("VM_STATE"), t.then(own("SWITCHOVER", switchover(3)))))
    bad("state-without-switchover", "reason-3", "KIND-2", "VM_STATE while the guest runs", lambda t: (t.drop("SWITCHOVER"), t.until("VM_STATE")))
    bad("state-after-final", "kept", "STATE-1", "VM_STATE behind FINAL",
        lambda t: (t.until("FINAL"), t.then(t.get("VM_STATE").copy().set(index=1))))
    bad("final-pages", "reason-3", "FINAL-5", "FINAL says one page more", lambda t: t.until("FINAL").set(memory_pages=9))
    bad("final-states", "reason-3", "FINAL-5", "FINAL says two blobs where there is one", lambda t: t.until("FINAL").set(states=2))
    bad("final-round", "reason-3", "FINAL-1", "FINAL names round 0", lambda t: t.until("FINAL").set(final_round=0))
    bad("final-paused", "reason-3", "FINAL-6", "FINAL of a paused guest, and PAUSED was not agreed on", lambda t: t.until("FINAL").set(guest=1))
    bad("final-digest", "reason-7", "FINAL-4 FINAL-1", "one bit of the digest of FINAL", lambda t: t.until("FINAL").set(digest=base ^ 1))

    def damaged_to_the_end(t):
        """The last round's page arrives damaged."""
        t.get("PAGES", 2).bodies = [three]
        wrong = v(0, one) + v(1, three) & MASK
        at = t.find("ROUND_CLOSED", 1)
        t.blocks.insert(at, theirs("GIVE_BACK", give_back(0, 0, 4, 1, [(0, 1, 1)])))
        t.blocks[at - 1], t.blocks[at] = t.blocks[at], t.blocks[at - 1]
        t.get("ROUND_CLOSED", 1).set(pages=0, digest=wrong, damaged_pages=1)
        t.until("PREPARED").set(digest=wrong)

    bad("prepared-though-digests-differ", "reason-7", "PREP-1 FINAL-4", "the last page arrives damaged, and the destination says PREPARED with its own digest",
        damaged_to_the_end, "page-damaged")
    bad("prepared-before-final", "reason-3", "PREP-1", "PREPARED without FINAL", lambda t: (t.drop("FINAL"), t.until("PREPARED")))
    bad("prepared-twice", "reason-3", "KIND-2 PREP-1", "PREPARED is said twice", lambda t: (t.until("PREPARED"), t.then(t.get("PREPARED").copy())))
    bad("commit-before-prepared", "reason-3", "KIND-2 COMMIT-2", "COMMIT before PREPARED", lambda t: (t.drop("PREPARED"), t.until("COMMIT")))
    bad("commit-digest", "reason-7", "COMMIT-1", "COMMIT has another digest than PREPARED", lambda t: t.until("COMMIT").set(digest=1))
    bad("running-before-commit", "reason-3", "RUNNING-1 COMMIT-1", "RUNNING without a COMMIT", lambda t: (t.drop("COMMIT"), t.until("RUNNING")))
    bad("abort-after-commit", "kept", "COMMIT-5", "the source says ABORT behind COMMIT",
        lambda t: (t.until("COMMIT"), t.then(own("ABORT", abort(1, 4, NONE, b"")))))
    bad("frame-after-abort", "kept", "ABORT-2", "KEEP_ALIVE behind ABORT", lambda t: t.then(own("KEEP_ALIVE", keep_alive(99))), "abort")
    bad("abort-phase", "kept", "ABORT-1", "ABORT says the phase commit in rounds", lambda t: t.until("ABORT").set(phase=4), "abort")
    bad("two-outcomes", "kept", "ASK-1", "OUTCOME is said twice", lambda t: t.then(t.get("OUTCOME").copy()), "ask")
    bad("outcome-not-what-happened", "kept", "ASK-2 ASK-3", "OUTCOME says that no COMMIT was read", lambda t: t.until("OUTCOME").set(state=1), "ask")

    # --- resume
    bad("resume-wrong-secret", "reason-16", "RESUME-1", "a resume shows another secret and is accepted",
        lambda t: (t.until("reply", channel="control-1"), t.get("hello", channel="control-1").set(token=TICKET)), "resume")

    def with_a_value(t):
        reply = t.until("reply", channel="control-1")
        reply.octets = hello_reply(values=[(1, 0, 5)])

    bad("resume-with-values", "reason-14", "PARAM-2", "the acceptance of a resume has a parameter", with_a_value, "resume")
    bad("resume-old-ticket", "kept", "GRANT-1", "the second GRANT has the ticket of the first", lambda t: t.until("GRANT", 1).set(ticket=TICKET), "resume")
    bad("resume-new-secret", "kept", "GRANT-1", "the second GRANT has another secret",
        lambda t: t.until("GRANT", 1).set(resume_secret=SECRET[::-1]), "resume")
    bad("resume-other-grant", "kept", "GRANT-5", "the second GRANT has another window", lambda t: t.until("GRANT", 1).set(device_window_bytes=4096), "resume")
    bad("resume-other-regions", "reason-3", "RESUME-5", "the region lies elsewhere", lambda t: t.until("REGIONS", 1).set(guest_address=0), "resume")
    bad("resume-page-before-landed", "kept", "JOIN-6 KIND-2", "PAGES before LANDED", lambda t: (t.drop("LANDED"), t.until("PAGES", channel="lane-1-1")), "resume")
    bad("landed-before-ready", "reason-3", "RESUME-6", "LANDED before READY", lambda t: (t.drop("READY", 1), t.until("LANDED")), "resume")
    bad("landed-rounds", "reason-3", "LANDED-1", "LANDED says that 9 rounds are closed", lambda t: t.until("LANDED").set(rounds_closed=9), "resume")
    bad("landed-more-than-sent", "reason-3", "LANDED-1", "LANDED covers 9 frames of a lane that has sent 3", lambda t: t.until("LANDED").set(frames=9), "resume")
    bad("landed-newer-incarnation", "reason-3", "LANDED-1", "LANDED speaks of incarnation 2 of a lane that is at 1",
        lambda t: t.until("LANDED").set(incarnation=2), "resume")

    # --- signs of life
    alive = lambda *says: own("KEEP_ALIVE", keep_alive(*says))
    bad("keep-alive-stamp", "kept", "ALIVE-1", "the second stamp is the first again", lambda t: (t.until("READY"), t.then(alive(5), alive(5))))
    bad("keep-alive-echo", "kept", "ALIVE-4", "a stamp is echoed that nobody sent", lambda t: (t.until("READY"), t.then(alive(5, 77, 1))))


def layout_seeds():
    """Seeds of the layout target: a number of regions, the regions (id, address, bytes), then runs."""
    def entry(name, table, wanted):
        raw = bytes([len(table)]) + b"".join(struct.pack("<IQQ", *region) for region in table)
        raw += b"".join(struct.pack("<IIQ", region, count, first) for region, first, count in wanted)
        seed("layout", name, raw)

    entry("two-regions", REGIONS, [(0, 0, 256), (1, 511, 1), (1, 0, 512)])
    entry("past-end", REGIONS, [(0, 255, 2), (1, 512, 1), (2, 0, 1), (0, 0, 0)])
    entry("wrapping-run", REGIONS, [(0, (1 << 64) - 1, 1), (1, (1 << 64) - 1, NONE)])
    entry("descending", [(0, 1 << 32, PAGE), (1, 0, PAGE)], [(0, 0, 1), (1, 0, 1)])
    entry("overlap", [(0, PAGE, 2 * PAGE), (1, 0, 2 * PAGE)], [])
    entry("top", [(0, (1 << 64) - 2 * PAGE, PAGE)], [(0, 0, 1)])


def main():
    for old in HERE.glob("*.txt"):
        old.unlink()
    accepted()
    rejected()
    sessions()
    illegal(talks())
    digest_file()
    layout_seeds()


if __name__ == "__main__":
    main()
