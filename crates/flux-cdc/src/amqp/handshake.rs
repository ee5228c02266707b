//! Opening a connection: up to a channel that confirms, and an exchange that is there.
//!
//! What this module does not do: declare queues. One that nobody reads would fill the broker.

use std::sync::Arc;
use std::time::Duration;

use amq_protocol::auth::{Credentials, SASLMechanism};
use amq_protocol::frame::{AMQPFrame, ProtocolVersion};
use amq_protocol::protocol::{AMQPClass, channel, confirm, connection, exchange};
use amq_protocol::types::{AMQPValue, FieldTable, LongString, ShortString};
use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use super::frames::{CHANNEL, MAX_FRAME_BYTES, MIN_FRAME_BYTES, write_frame, write_method};
use super::incoming::{Incoming, read_frame};
use super::pending::Pending;
use super::{AmqpError, Connection, Link, QUEUE, closed};
use crate::trouble::Troubles;
use crate::url::Url;

/// How long a broker may take until everything is ready.
const OPENING: Duration = Duration::from_secs(10);
/// A heartbeat at least so often, so that a broker that is gone is noticed within twice that.
const HEARTBEAT_S: u16 = 10;
/// What this side says it can take of the broker, beside AMQP itself.
const CAPABILITIES: [&str; 4] =
    ["publisher_confirms", "basic.nack", "connection.blocked", "authentication_failure_close"];

impl Connection {
    /// Connects, declares the exchange (topic, durable) or finds it as it is, and asks for confirms.
    ///
    /// # Errors
    /// [`AmqpError`].
    pub(crate) async fn open(
        url: &Url,
        exchange: &str,
        troubles: &Arc<Troubles>,
    ) -> Result<(Connection, Link), AmqpError> {
        let opening = Opening::open(url, exchange);
        let opening = timeout(OPENING, opening).await.map_err(|_| AmqpError::Silent(OPENING))??;
        let Opening { socket, input, frame_max, heartbeat_s, .. } = opening;
        let (sender, queue) = mpsc::channel(QUEUE);
        let link = Link { queue: sender, exchange: exchange.into(), frame_max };
        let now = Instant::now();
        let connection = Connection {
            socket,
            frame_max,
            heartbeat: (heartbeat_s > 0).then(|| Duration::from_secs(u64::from(heartbeat_s))),
            input,
            output: Vec::new(),
            written: 0,
            last_read: now,
            last_write: now,
            opened: now,
            queue,
            pending: Pending::default(),
            returning: None,
            blocked: None,
            unblocked: now,
            troubles: troubles.clone(),
        };
        Ok((connection, link))
    }
}

/// A connection on its way to be open: everything is asked and answered in turn.
struct Opening {
    socket: TcpStream,
    input: BytesMut,
    output: Vec<u8>,
    frame_max: u32,
    heartbeat_s: u16,
}

impl Opening {
    async fn open(url: &Url, exchange: &str) -> Result<Opening, AmqpError> {
        let socket = TcpStream::connect((url.host(), url.port())).await?;
        socket.set_nodelay(true)?;
        let (input, output) = (BytesMut::with_capacity(16 << 10), Vec::new());
        let frame_max = MAX_FRAME_BYTES;
        let mut opening = Opening { socket, input, output, frame_max, heartbeat_s: HEARTBEAT_S };
        opening.log_in(url).await?;
        opening.open_channel().await?;
        match opening.declare(exchange, false).await {
            // It is there and otherwise, or this user may not declare: what is there will do.
            Err(AmqpError::Refused(_)) => {
                opening.close_channel();
                opening.open_channel().await?;
                opening.declare(exchange, true).await?;
            }
            declared => declared?,
        }
        let select = confirm::AMQPMethod::Select(confirm::Select { nowait: false });
        expect(&opening.ask(CHANNEL, AMQPClass::Confirm(select)).await?, &Incoming::Done)?;
        Ok(opening)
    }

    async fn log_in(&mut self, url: &Url) -> Result<(), AmqpError> {
        let header = AMQPFrame::ProtocolHeader(ProtocolVersion::amqp_0_9_1());
        write_frame(&header, &mut self.output);
        expect(&self.answer().await?, &Incoming::Start)?;
        let plain = SASLMechanism::Plain;
        let credentials = Credentials::new(url.user().into(), url.password().into());
        let start_ok = connection::StartOk {
            client_properties: client_properties(),
            mechanism: ShortString::from(plain.name()),
            response: credentials.sasl_auth_string(plain),
            locale: ShortString::from("en_US"),
        };
        let start_ok = connection::AMQPMethod::StartOk(start_ok);
        let tune = self.ask(0, AMQPClass::Connection(start_ok)).await?;
        let Incoming::Tune { frame_max, heartbeat_s } = tune else {
            return Err(unexpected(&tune));
        };
        // 0 of the broker means no limit.
        let limit = |limit: u32| if limit == 0 { u32::MAX } else { limit };
        self.frame_max = limit(frame_max).clamp(MIN_FRAME_BYTES, MAX_FRAME_BYTES);
        self.heartbeat_s = heartbeat_s.min(HEARTBEAT_S);
        let tune_ok = connection::AMQPMethod::TuneOk(connection::TuneOk {
            channel_max: CHANNEL,
            frame_max: self.frame_max,
            heartbeat: self.heartbeat_s,
        });
        write_method(0, AMQPClass::Connection(tune_ok), &mut self.output);
        let virtual_host = short(url.vhost(), "virtual host")?;
        let open = connection::AMQPMethod::Open(connection::Open { virtual_host });
        expect(&self.ask(0, AMQPClass::Connection(open)).await?, &Incoming::Done)
    }

    async fn open_channel(&mut self) -> Result<(), AmqpError> {
        let open = channel::AMQPMethod::Open(channel::Open {});
        expect(&self.ask(CHANNEL, AMQPClass::Channel(open)).await?, &Incoming::Done)
    }

    /// Answers that the broker closed the channel.
    fn close_channel(&mut self) {
        let close_ok = channel::AMQPMethod::CloseOk(channel::CloseOk {});
        write_method(CHANNEL, AMQPClass::Channel(close_ok), &mut self.output);
    }

    async fn declare(&mut self, exchange: &str, passive: bool) -> Result<(), AmqpError> {
        let declare = exchange::Declare {
            exchange: short(exchange, "exchange")?,
            kind: ShortString::from("topic"),
            passive,
            durable: true,
            auto_delete: false,
            internal: false,
            nowait: false,
            arguments: FieldTable::default(),
        };
        let declare = exchange::AMQPMethod::Declare(declare);
        expect(&self.ask(CHANNEL, AMQPClass::Exchange(declare)).await?, &Incoming::Done)
    }

    async fn ask(&mut self, channel: u16, method: AMQPClass) -> Result<Incoming, AmqpError> {
        write_method(channel, method, &mut self.output);
        self.answer().await
    }

    /// Writes what is to be written and waits for the next method.
    async fn answer(&mut self) -> Result<Incoming, AmqpError> {
        self.socket.write_all(&self.output).await?;
        self.output.clear();
        loop {
            match read_frame(&mut self.input, self.frame_max)? {
                Some(Incoming::Close { code, text }) => return Err(closed(code, text)),
                Some(Incoming::Heartbeat) => {}
                Some(frame) => return Ok(frame),
                None => {
                    if self.socket.read_buf(&mut self.input).await? == 0 {
                        return Err(AmqpError::Ended);
                    }
                }
            }
        }
    }
}

fn client_properties() -> FieldTable {
    let mut capabilities = FieldTable::default();
    for name in CAPABILITIES {
        capabilities.insert(ShortString::from(name), AMQPValue::Boolean(true));
    }
    let mut properties = FieldTable::default();
    let text = |text: &str| AMQPValue::LongString(LongString::from(text));
    properties.insert(ShortString::from("product"), text("Flux-KV"));
    properties.insert(ShortString::from("version"), text(env!("CARGO_PKG_VERSION")));
    properties.insert(ShortString::from("capabilities"), AMQPValue::FieldTable(capabilities));
    properties
}

fn short(text: &str, what: &str) -> Result<ShortString, AmqpError> {
    let too_long = |_| AmqpError::Refused(format!("the name of the {what} is too long"));
    ShortString::try_new(text).map_err(too_long)
}

fn expect(frame: &Incoming, expected: &Incoming) -> Result<(), AmqpError> {
    if frame == expected { Ok(()) } else { Err(unexpected(frame)) }
}

fn unexpected(frame: &Incoming) -> AmqpError {
    AmqpError::protocol(format!("{frame:?} has no place here"))
}
