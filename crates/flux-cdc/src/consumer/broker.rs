//! The way to the queue: a connection, a channel, the queue with its binding, and deliveries.
//!
//! The queue is a quorum queue with a single active consumer: what one consumer did not acknowledge
//! comes to the next one, in order. The exchange is the publisher's: it is waited for, not made.
//!
//! What this module does not do: try again, or look into deliveries.

use std::time::Duration;

use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, BasicRejectOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::uri::AMQPUri;
use lapin::{Channel, Connection, ConnectionProperties, Consumer, ErrorKind, Queue};
use tokio::time::timeout;

use super::ConsumerConfig;
use super::intake::Ack;

/// How long it may take to get to the first delivery.
const OPENING: Duration = Duration::from_secs(20);
/// How long the broker may take to say good-bye.
const CLOSING: Duration = Duration::from_secs(2);
/// How often one of both sides must say something: a broker that is gone without a word is noticed after twice
/// this.
const HEARTBEAT_S: u16 = 10;
const CONSUMER_TAG: &str = "flux-consume";
/// A redelivery is what this consumer is made for, but RabbitMQ 4 drops a message after 20 of them where
/// the queue does not say otherwise. This is more than there will be.
const DELIVERY_LIMIT: i64 = 1_000_000_000;

/// Why there are no deliveries, or none any more. All of these may pass.
#[derive(Debug, thiserror::Error)]
pub(super) enum Setback {
    #[error("the broker cannot be reached")]
    Unreachable(#[source] lapin::Error),
    #[error("the broker did not answer within {} s", OPENING.as_secs())]
    Silent,
    #[error("the broker refuses the name or the password of user `{0}`")]
    Credentials(String),
    #[error("the broker has no virtual host `{vhost}`, or user `{user}` may not enter it")]
    VirtualHost { vhost: String, user: String },
    #[error("user `{user}` may not do what a consumer must: {words}")]
    Forbidden { user: String, words: String },
    #[error(
        "there is no exchange `{0}` yet: a node makes it when it begins to publish (is its rabbitmq_url set?)"
    )]
    NoExchange(String),
    #[error("the queue was deleted, and with it what was in it")]
    QueueDeleted,
    #[error("the connection was lost")]
    Lost(#[source] lapin::Error),
}

impl Setback {
    /// Whether a person must do something before it can pass.
    pub(super) const fn needs_a_person(&self) -> bool {
        matches!(
            self,
            Setback::Credentials(_) | Setback::VirtualHost { .. } | Setback::Forbidden { .. }
        )
    }

    fn of(error: lapin::Error, config: &ConsumerConfig) -> Setback {
        let user = || config.address.user().to_owned();
        let ErrorKind::ProtocolError(said) = error.kind() else {
            return match error.kind() {
                ErrorKind::IOError(_) => Setback::Unreachable(error),
                _ => Setback::Lost(error),
            };
        };
        let words = said.get_message().to_string();
        match said.kind() {
            // Said before there is a channel, it is about who wants to enter.
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED)
                if words.contains("Login was refused") =>
            {
                Setback::Credentials(user())
            }
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => {
                Setback::Forbidden { user: user(), words }
            }
            AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => {
                Setback::NoExchange(config.exchange.clone())
            }
            AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) if words.contains("vhost") => {
                let vhost = config.address.vhost().to_owned();
                Setback::VirtualHost { vhost, user: user() }
            }
            _ => Setback::Lost(error),
        }
    }
}

/// Deliveries, until the connection breaks.
pub(super) struct Subscription {
    connection: Connection,
    channel: Channel,
    pub(super) consumer: Consumer,
    /// The queue when it was found: how much waits in it, and for how many other consumers.
    pub(super) queue: Queue,
    /// The queue was there, with other settings than it would get.
    pub(super) is_foreign: bool,
}

impl Subscription {
    /// Connects and subscribes.
    pub(super) async fn open(config: &ConsumerConfig) -> Result<Subscription, Setback> {
        match timeout(OPENING, subscribe(config)).await {
            Ok(opened) => opened.map_err(|error| Setback::of(error, config)),
            Err(_) => Err(Setback::Silent),
        }
    }

    /// Acknowledges. Where that fails, the next delivery will say so.
    pub(super) async fn acknowledge(&self, acks: &[Ack]) {
        for &Ack { tag, multiple } in acks {
            let _ = self.channel.basic_ack(tag, BasicAckOptions { multiple }).await;
        }
    }

    /// Refuses a delivery for good: the broker gives it to the queue's dead-letter exchange, if it has
    /// one.
    pub(super) async fn reject(&self, tag: u64) {
        let _ = self.channel.basic_reject(tag, BasicRejectOptions { requeue: false }).await;
    }

    /// Asks for no more deliveries. Those on their way come, then the end.
    pub(super) async fn cancel(&self) {
        let options = BasicCancelOptions::default();
        let _ = timeout(CLOSING, self.channel.basic_cancel(CONSUMER_TAG.into(), options)).await;
    }

    /// Closes the connection in order, so that acknowledgements arrive.
    pub(super) async fn close(self) {
        let _ = timeout(CLOSING, self.connection.close(200, "done".into())).await;
    }
}

async fn subscribe(config: &ConsumerConfig) -> Result<Subscription, lapin::Error> {
    let properties = ConnectionProperties::default().with_connection_name("flux consume".into());
    let mut uri = AMQPUri::from(&config.address);
    uri.query.heartbeat = Some(HEARTBEAT_S);
    let connection = Connection::connect_uri(uri, properties).await?;
    let mut channel = connection.create_channel().await?;
    let (queue, is_foreign) = match declare(&channel, config).await {
        Err(error) if is_refused_precondition(&error) => {
            // That closed the channel.
            channel = connection.create_channel().await?;
            let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            let name = config.queue.as_str().into();
            (channel.queue_declare(name, options, FieldTable::default()).await?, true)
        }
        declared => (declared?, false),
    };
    let (name, exchange) = (config.queue.as_str(), config.exchange.as_str());
    for key in &config.bind {
        let options = QueueBindOptions::default();
        let bound = channel.queue_bind(
            name.into(),
            exchange.into(),
            key.as_str().into(),
            options,
            FieldTable::default(),
        );
        bound.await?;
    }
    channel.basic_qos(config.prefetch, BasicQosOptions::default()).await?;
    let consumer = channel.basic_consume(
        name.into(),
        CONSUMER_TAG.into(),
        BasicConsumeOptions::default(),
        FieldTable::default(),
    );
    let consumer = consumer.await?;
    Ok(Subscription { connection, channel, consumer, queue, is_foreign })
}

async fn declare(channel: &Channel, config: &ConsumerConfig) -> Result<Queue, lapin::Error> {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    arguments.insert("x-single-active-consumer".into(), AMQPValue::Boolean(true));
    arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(DELIVERY_LIMIT));
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(config.queue.as_str().into(), options, arguments).await
}

fn is_refused_precondition(error: &lapin::Error) -> bool {
    let ErrorKind::ProtocolError(said) = error.kind() else { return false };
    matches!(said.kind(), AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED))
}
