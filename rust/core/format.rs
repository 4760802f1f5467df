//! The bytes of a stored row, format 1; `docs/design/checkpoints.md` draws them.
//!
//! Integers are little-endian. A row has exactly one form: what is not there takes no room, and
//! nothing stands between or after the fields. The checksum covers the id of the run and everything
//! before it, so a row that was put under another run is damaged too.
//!
//! The first six bytes, magic and format, keep their meaning in every format to come. Bytes are read
//! in an order that guesses nothing: what they are, which format, how long, whether they are what
//! was written; only then the fields.

use crc::{CRC_32_ISCSI, Crc, Table};

use super::checkpoint::{Damage, Limits, Problem, Row, RowError, RowKind, WorkflowId, short};

const MAGIC: [u8; 4] = *b"cano";
const FORMAT: u16 = 1;
/// Magic, format, kind, flags, length.
const HEADER: usize = 12;
const CHECKSUM: usize = 4;

const NEXT_STATE: u8 = 1;
const REFERS_TO: u8 = 1 << 1;
const DUE_AT: u8 = 1 << 2;
const PAYLOAD: u8 = 1 << 3;
const SNAPSHOT: u8 = 1 << 4;
const INTENT: u8 = 1 << 5;
const FLAGS: u8 = NEXT_STATE | REFERS_TO | DUE_AT | PAYLOAD | SNAPSHOT | INTENT;

/// CRC-32C, also called Castagnoli's.
static CRC: Crc<u32, Table<16>> = Crc::<u32, Table<16>>::new(&CRC_32_ISCSI);

impl Row {
    /// The bytes to store under `id`, if the row keeps the rules and `limits`.
    pub fn encode(&self, id: &WorkflowId, limits: &Limits) -> Result<Vec<u8>, RowError> {
        let blobs = || {
            short("output_blob", self.payload.as_ref().map_or(0, Vec::len), limits.blob)?;
            short("snapshot", self.snapshot.as_ref().map_or(0, Vec::len), limits.blob)
        };
        self.check().and_then(|()| blobs()).map_err(|fault| RowError {
            id: id.clone(),
            sequence: self.sequence,
            problem: Problem::Fault(fault),
        })?;
        Ok(self.written(id))
    }

    /// Reads what `encode` wrote for this row of this run.
    pub fn decode(id: &WorkflowId, sequence: u64, bytes: &[u8]) -> Result<Self, RowError> {
        read(id, sequence, bytes).map_err(|problem| RowError { id: id.clone(), sequence, problem })
    }

    fn written(&self, id: &WorkflowId) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(256 + self.payload.as_ref().map_or(0, Vec::len));
        bytes.extend(MAGIC);
        bytes.extend(FORMAT.to_le_bytes());
        bytes.push(self.kind as u8);
        bytes.push(self.flags());
        bytes.extend([0; 4]); // the length, once it is known
        bytes.extend(self.sequence.to_le_bytes());
        bytes.extend(self.run_id);
        bytes.extend(self.fingerprint.to_le_bytes());
        bytes.extend(self.recorded_at.to_le_bytes());
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.visit.to_le_bytes());
        bytes.extend(self.attempt.to_le_bytes());
        for label in [Some(&self.state), Some(&self.task), self.next_state.as_ref()].into_iter().flatten() {
            bytes.push(label.len() as u8);
            bytes.extend(label.as_bytes());
        }
        for number in [self.refers_to, self.due_at].into_iter().flatten() {
            bytes.extend(number.to_le_bytes());
        }
        for blob in [&self.payload, &self.snapshot].into_iter().flatten() {
            bytes.extend((blob.len() as u32).to_le_bytes());
            bytes.extend(blob);
        }
        let length = (bytes.len() + CHECKSUM) as u32;
        bytes[8..HEADER].copy_from_slice(&length.to_le_bytes());
        bytes.extend(checksum(id, &bytes).to_le_bytes());
        bytes
    }

    fn flags(&self) -> u8 {
        let flag = |is_there, flag| if is_there { flag } else { 0 };
        flag(self.next_state.is_some(), NEXT_STATE)
            | flag(self.refers_to.is_some(), REFERS_TO)
            | flag(self.due_at.is_some(), DUE_AT)
            | flag(self.payload.is_some(), PAYLOAD)
            | flag(self.snapshot.is_some(), SNAPSHOT)
            | flag(self.is_intent, INTENT)
    }
}

fn checksum(id: &WorkflowId, bytes: &[u8]) -> u32 {
    let mut digest = CRC.digest();
    digest.update(id.as_str().as_bytes());
    digest.update(bytes);
    digest.finalize()
}

fn read(id: &WorkflowId, sequence: u64, bytes: &[u8]) -> Result<Row, Problem> {
    let mut header = Reader { bytes, at: 0 };
    if bytes.len() < HEADER {
        return Err(damaged(0, Damage::Short { length: bytes.len() }));
    }
    if header.array()? != MAGIC {
        return Err(damaged(0, Damage::Magic));
    }
    let format = u16::from_le_bytes(header.array()?);
    if format != FORMAT {
        return Err(Problem::Format { format });
    }
    let [kind, flags] = header.array()?;
    let said = header.u32()?;
    if said as usize != bytes.len() {
        return Err(damaged(8, Damage::Length { said, length: bytes.len() }));
    }
    let Some((body, stored)) = bytes.split_last_chunk::<CHECKSUM>().filter(|(body, _)| body.len() >= HEADER) else {
        return Err(damaged(0, Damage::Short { length: bytes.len() }));
    };
    let (stored, computed) = (u32::from_le_bytes(*stored), checksum(id, body));
    if stored != computed {
        return Err(damaged(body.len(), Damage::Checksum { stored, computed }));
    }
    let kind = kind_of(kind).ok_or_else(|| damaged(6, Damage::Kind(kind)))?;
    if flags & !FLAGS != 0 {
        return Err(damaged(7, Damage::Flags(flags)));
    }
    let row = fields(kind, flags, &mut Reader { bytes: body, at: HEADER })?;
    if row.sequence != sequence {
        return Err(damaged(HEADER, Damage::Sequence(row.sequence)));
    }
    row.check().map_err(|fault| damaged(HEADER, Damage::Fault(fault)))?;
    Ok(row)
}

fn fields(kind: RowKind, flags: u8, reader: &mut Reader<'_>) -> Result<Row, Problem> {
    let has = |flag| flags & flag != 0;
    let row = Row {
        kind,
        is_intent: has(INTENT),
        sequence: reader.u64()?,
        run_id: reader.array()?,
        fingerprint: reader.u64()?,
        recorded_at: reader.u64()?,
        version: reader.u32()?,
        visit: reader.u32()?,
        attempt: reader.u32()?,
        state: reader.label()?,
        task: reader.label()?,
        next_state: has(NEXT_STATE).then(|| reader.label()).transpose()?,
        refers_to: has(REFERS_TO).then(|| reader.u64()).transpose()?,
        due_at: has(DUE_AT).then(|| reader.u64()).transpose()?,
        payload: has(PAYLOAD).then(|| reader.blob()).transpose()?,
        snapshot: has(SNAPSHOT).then(|| reader.blob()).transpose()?,
    };
    if reader.at == reader.bytes.len() { Ok(row) } else { Err(damaged(reader.at, Damage::End)) }
}

fn kind_of(number: u8) -> Option<RowKind> {
    RowKind::ALL.into_iter().find(|kind| *kind as u8 == number)
}

fn damaged(offset: usize, damage: Damage) -> Problem {
    Problem::Damaged { offset, damage }
}

/// Bytes, and how many of them have been read.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Problem> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..length).ok_or_else(|| damaged(self.at, Damage::End))?;
        self.at += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        Ok(self.take(N)?.try_into().expect("as many were taken"))
    }

    fn u32(&mut self) -> Result<u32, Problem> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Problem> {
        self.array().map(u64::from_le_bytes)
    }

    fn label(&mut self) -> Result<String, Problem> {
        let [length] = self.array()?;
        let offset = self.at;
        let text = str::from_utf8(self.take(length.into())?).map_err(|_| damaged(offset, Damage::Text))?;
        Ok(text.to_owned())
    }

    fn blob(&mut self) -> Result<Vec<u8>, Problem> {
        let length = self.u32()?;
        Ok(self.take(length as usize)?.to_vec())
    }
}
