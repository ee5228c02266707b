//! Floating point numbers as INCRBYFLOAT of Redis sees them: x87 `long double`, of 64 bits of mantissa.
//!
//! With `f64`, 0.1 + 0.2 would not print as 0.3. So the three operations that Redis needs are done on
//! integers here, and give its digits: text to number and addition, each rounded to the nearest and
//! half to even, and printing as by `%.17Lf` without the zeros at the end, never in exponent form.
//!
//! Two differences, neither of them visible in numbers that people write: digits after the first 100
//! of a number only count as not zero, and numbers below 1e-4931 keep their full precision.

use std::fmt;

/// The exponents that the highest bit may have; outside, a text is no number and a sum overflows.
const MAX_TOP_EXPONENT: i32 = 16383;
const MIN_TOP_EXPONENT: i32 = -16445;

/// Longer texts are no numbers, as in Redis.
const MAX_TEXT_BYTES: usize = 5119;

const MAX_DIGITS: usize = 100;

/// 2^`exponent` times the mantissa, which is 0 or has its highest bit set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LongDouble {
    negative: bool,
    mantissa: u64,
    exponent: i32,
}

impl LongDouble {
    const ZERO: LongDouble = LongDouble { negative: false, mantissa: 0, exponent: 0 };

    /// The number that the whole text is, in the forms of C's `strtold`, infinity and hexadecimal
    /// digits included; not NaN, no space around it, and nothing that is out of range.
    pub(super) fn parse(text: &[u8]) -> Option<LongDouble> {
        if text.len() > MAX_TEXT_BYTES {
            return None;
        }
        let (negative, unsigned) = match text {
            [b'-', rest @ ..] => (true, rest),
            [b'+', rest @ ..] => (false, rest),
            _ => (false, text),
        };
        let magnitude = if unsigned.eq_ignore_ascii_case(b"inf")
            || unsigned.eq_ignore_ascii_case(b"infinity")
        {
            LongDouble { negative, mantissa: 1 << 63, exponent: i32::MAX }
        } else if let [b'0', b'x' | b'X', digits @ ..] = unsigned {
            parse_hexadecimal(digits)?
        } else {
            parse_decimal(unsigned)?
        };
        Some(LongDouble { negative, ..magnitude })
    }

    /// The sum, `None` if it is not finite.
    pub(super) fn add(self, other: LongDouble) -> Option<LongDouble> {
        if self.is_infinite() || other.is_infinite() {
            return None;
        }
        if self.mantissa == 0 {
            return Some(other);
        }
        if other.mantissa == 0 {
            return Some(self);
        }
        let order = |number: &LongDouble| (number.exponent, number.mantissa);
        let (large, small) =
            if order(&self) >= order(&other) { (self, other) } else { (other, self) };
        // 63 bits below the mantissa, so that what is cut off only matters as being there or not.
        let shift = large.exponent.abs_diff(small.exponent);
        let addend = u128::from(small.mantissa) << 63;
        let shifted = addend.checked_shr(shift).unwrap_or(0);
        let cut = shifted.checked_shl(shift).unwrap_or(0) != addend;
        let base = u128::from(large.mantissa) << 63;
        let sum = if large.negative == small.negative {
            base + shifted
        } else {
            base - shifted - u128::from(cut)
        };
        let sum = round(sum, large.exponent - 63, cut);
        let negative = large.negative;
        (sum.top_exponent() <= MAX_TOP_EXPONENT).then_some(LongDouble { negative, ..sum })
    }

    fn is_infinite(self) -> bool {
        self.exponent == i32::MAX
    }

    fn top_exponent(self) -> i32 {
        self.exponent.saturating_add(63)
    }

    /// The number if it is neither too large nor too small for a `long double`.
    fn in_range(self) -> Option<LongDouble> {
        let range = MIN_TOP_EXPONENT..=MAX_TOP_EXPONENT;
        (self.mantissa == 0 || range.contains(&self.top_exponent())).then_some(self)
    }
}

impl fmt::Display for LongDouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SCALE: u128 = 100_000_000_000_000_000;
        let sign = if self.negative { "-" } else { "" };
        if self.mantissa != 0 && self.exponent >= 0 {
            let mut integer = Natural::from(u128::from(self.mantissa));
            integer.shift_left(self.exponent.unsigned_abs());
            return write!(f, "{sign}{}", integer.into_decimal());
        }
        let scaled = u128::from(self.mantissa) * SCALE;
        let shift = self.exponent.unsigned_abs();
        let quotient = scaled.checked_shr(shift).unwrap_or(0);
        let rest = scaled - quotient.checked_shl(shift).unwrap_or(0);
        let half = 1u128.checked_shl(shift.saturating_sub(1)).unwrap_or(u128::MAX);
        let up = shift > 0 && (rest > half || (rest == half && quotient % 2 == 1));
        let rounded = quotient + u128::from(up);
        match (rounded / SCALE, rounded % SCALE) {
            (0, 0) => f.write_str("0"),
            (integer, 0) => write!(f, "{sign}{integer}"),
            (integer, fraction) => {
                let fraction = format!("{fraction:017}");
                write!(f, "{sign}{integer}.{}", fraction.trim_end_matches('0'))
            }
        }
    }
}

/// The digits of a number and where its point is: `exponent` digits after the last of `digits`.
struct Digits<'a> {
    digits: Vec<u8>,
    exponent: i32,
    rest: &'a [u8],
}

/// Digits with at most one point among them, down to the first other byte. Leading zeros are left
/// out. What follows the first `MAX_DIGITS` is replaced by one digit that says whether it is not 0.
fn digits(text: &[u8], radix: u32) -> Option<Digits<'_>> {
    let (mut digits, mut exponent) = (Vec::with_capacity(MAX_DIGITS + 1), 0);
    let (mut point, mut some, mut dropped) = (false, false, false);
    let mut end = text.len();
    for (at, &byte) in text.iter().enumerate() {
        if byte == b'.' && !point {
            point = true;
            continue;
        }
        let Some(digit) = char::from(byte).to_digit(radix) else {
            end = at;
            break;
        };
        some = true;
        if digits.len() == MAX_DIGITS {
            dropped |= digit != 0;
            exponent += i32::from(!point);
        } else {
            if digit != 0 || !digits.is_empty() {
                digits.push(digit as u8);
            }
            exponent -= i32::from(point);
        }
    }
    if dropped {
        digits.push(1);
        exponent -= 1;
    }
    some.then_some(Digits { digits, exponent, rest: &text[end..] })
}

/// What follows the digits: nothing, or a marker and a number in decimal digits, with or without sign.
/// A number that is out of all proportion is cut down to one that still is.
fn exponent(text: &[u8], marker: u8) -> Option<i32> {
    let Some((&first, number)) = text.split_first() else {
        return Some(0);
    };
    if !first.eq_ignore_ascii_case(&marker) {
        return None;
    }
    let (negative, digits) = match number {
        [b'-', digits @ ..] => (true, digits),
        [b'+', digits @ ..] => (false, digits),
        _ => (false, number),
    };
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let value = digits
        .iter()
        .fold(0i32, |value, digit| (value * 10 + i32::from(digit - b'0')).min(1_000_000));
    Some(if negative { -value } else { value })
}

fn parse_decimal(text: &[u8]) -> Option<LongDouble> {
    let Digits { digits, exponent: shift, rest } = digits(text, 10)?;
    let exponent = exponent(rest, b'e')? + shift;
    if digits.is_empty() {
        return Some(LongDouble::ZERO);
    }
    // Far out of range, whatever the digits; this bounds the work below.
    if !(-5000..=5000).contains(&(exponent + digits.len() as i32)) {
        return None;
    }
    let mut number = Natural::default();
    for digit in digits {
        number.multiply_add(10, u32::from(digit));
    }
    let power = exponent.unsigned_abs();
    if exponent >= 0 {
        number.multiply_power_of_ten(power);
        return number.round(0, false).in_range();
    }
    // Bits enough that the quotient by 10^power has more than 64: 3.322 is above log2(10).
    let shift = power * 3322 / 1000 + 68;
    number.shift_left(shift);
    let cut = number.divide_power_of_ten(power);
    number.round(-(shift as i32), cut).in_range()
}

fn parse_hexadecimal(text: &[u8]) -> Option<LongDouble> {
    let Digits { digits, exponent: shift, rest } = digits(text, 16)?;
    let exponent = exponent(rest, b'p')? + 4 * shift;
    let mut number = Natural::default();
    for digit in digits {
        number.multiply_add(16, u32::from(digit));
    }
    number.round(exponent, false).in_range()
}

/// Rounds `number` * 2^`exponent` to 64 bits; `cut` says that something below `number` was cut off.
fn round(number: u128, exponent: i32, cut: bool) -> LongDouble {
    if number == 0 {
        return LongDouble::ZERO;
    }
    let zeros = number.leading_zeros();
    let normal = number << zeros;
    let (mantissa, rest) = ((normal >> 64) as u64, normal as u64);
    let exponent = exponent + 64 - zeros as i32;
    let half = 1 << 63;
    let up = rest > half || (rest == half && (cut || mantissa % 2 == 1));
    match mantissa.checked_add(u64::from(up)) {
        Some(mantissa) => LongDouble { negative: false, mantissa, exponent },
        None => LongDouble { negative: false, mantissa: half, exponent: exponent + 1 },
    }
}

/// A natural number of any size: 32 bits to a limb, lowest first, the last one not 0.
#[derive(Clone, Debug, Default)]
struct Natural(Vec<u32>);

impl From<u128> for Natural {
    fn from(number: u128) -> Natural {
        let mut natural = Natural((0..4).map(|limb| (number >> (32 * limb)) as u32).collect());
        natural.trim();
        natural
    }
}

impl Natural {
    const TEN_TO_9: u32 = 1_000_000_000;

    fn trim(&mut self) {
        while self.0.last() == Some(&0) {
            self.0.pop();
        }
    }

    fn multiply_add(&mut self, factor: u32, addend: u32) {
        let mut carry = u64::from(addend);
        for limb in &mut self.0 {
            carry += u64::from(*limb) * u64::from(factor);
            *limb = carry as u32;
            carry >>= 32;
        }
        if carry > 0 {
            self.0.push(carry as u32);
        }
    }

    /// Divides and returns the remainder.
    fn divide(&mut self, divisor: u32) -> u32 {
        let mut rest = 0;
        for limb in self.0.iter_mut().rev() {
            let part = rest << 32 | u64::from(*limb);
            *limb = (part / u64::from(divisor)) as u32;
            rest = part % u64::from(divisor);
        }
        self.trim();
        rest as u32
    }

    fn multiply_power_of_ten(&mut self, power: u32) {
        for _ in 0..power / 9 {
            self.multiply_add(Self::TEN_TO_9, 0);
        }
        self.multiply_add(10u32.pow(power % 9), 0);
    }

    /// Divides and returns whether there was a remainder.
    fn divide_power_of_ten(&mut self, power: u32) -> bool {
        let mut cut = false;
        for _ in 0..power / 9 {
            cut |= self.divide(Self::TEN_TO_9) != 0;
        }
        self.divide(10u32.pow(power % 9)) != 0 || cut
    }

    fn shift_left(&mut self, bits: u32) {
        self.multiply_add(1 << (bits % 32), 0);
        if !self.0.is_empty() {
            self.0.splice(0..0, std::iter::repeat_n(0, (bits / 32) as usize));
        }
    }

    fn round(&self, exponent: i32, cut: bool) -> LongDouble {
        let low = self.0.len().saturating_sub(4);
        let top = self.0[low..].iter().rev().fold(0u128, |top, limb| top << 32 | u128::from(*limb));
        // At least 97 bits are looked at when there are limbs below: enough to see a half.
        let cut = cut || self.0[..low].iter().any(|limb| *limb != 0);
        round(top, exponent + 32 * low as i32, cut)
    }

    fn into_decimal(mut self) -> String {
        let mut groups = Vec::new();
        while !self.0.is_empty() {
            groups.push(self.divide(Self::TEN_TO_9));
        }
        let first = groups.pop().unwrap_or(0);
        let rest = groups.iter().rev().map(|group| format!("{group:09}"));
        std::iter::once(first.to_string()).chain(rest).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(left: &str, right: &str) -> Option<String> {
        let parse = |text: &str| LongDouble::parse(text.as_bytes()).expect(text);
        parse(left).add(parse(right)).map(|sum| sum.to_string())
    }

    #[test]
    fn sums_have_the_digits_of_redis() {
        // Each was answered by INCRBYFLOAT of Redis 7.0.15 on x86-64.
        let table = include_str!("long_double_sums.txt");
        let mut lines = 0;
        for line in table.lines().filter(|line| !line.starts_with('#')) {
            let [left, right, expected] = line.split(' ').collect::<Vec<_>>()[..] else {
                panic!("three words to a line: {line}")
            };
            assert_eq!(sum(left, right).as_deref(), Some(expected), "{left} + {right}");
            lines += 1;
        }
        assert!(lines > 100);
    }

    #[test]
    fn what_is_not_finite_is_no_sum() {
        assert_eq!(sum("inf", "1"), None);
        assert_eq!(sum("1", "-INFINITY"), None);
        assert_eq!(sum("1.1e4932", "1.1e4932"), None);
        assert_eq!(sum("-1.1e4932", "-1.1e4932"), None);
        assert_eq!(sum("1.1e4932", "-1.1e4932").as_deref(), Some("0"));
    }

    #[test]
    fn what_is_not_a_number_is_refused() {
        let long = "1".repeat(5120);
        let wrong = [
            "",
            " 1",
            "1 ",
            "+",
            "-",
            ".",
            "-.",
            "e5",
            "1e",
            "1e+",
            "1e5x",
            "1.2.3",
            "--1",
            "+-1",
            "1,5",
            "nan",
            "NaN",
            "-nan",
            "inf1",
            "infin",
            "0x",
            "0x.",
            "0xp3",
            "0x1p",
            "0x1e+1",
            "1p3",
            "1_000",
            "1e5000",
            "-1e5000",
            "1e-5000",
            "1e99999999999999",
            "0x1p20000",
            "0x1p-20000",
            "1\0",
            &long,
        ];
        for text in wrong {
            assert_eq!(LongDouble::parse(text.as_bytes()), None, "{text}");
        }
    }
}
