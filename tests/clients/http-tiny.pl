# Perl: HTTP::Tiny, which comes with it, and the spec's rules for reading a stream: http-tiny.pl URL
# After a cut it asks once more by itself, from the old place: what it gets then is not taken.
use strict;
use warnings;
use HTTP::Tiny;
use JSON::PP;

my ($url) = @ARGV;
my ($last_id, $retry) = ('', 0.3);
my $json = JSON::PP->new->canonical; # the bytes are UTF-8 as they are
$| = 1;

while (1) {
    my ($rest, $type, $id, @data) = ('', 'message', $last_id);
    my $answered;
    my $take = sub {
        my ($bytes, $answer) = @_;
        $answered //= $answer;
        die "cut off\n" if $answer != $answered;
        $rest .= $bytes;
        while ($rest =~ s/^([^\n]*)\n//) {
            my $line = $1;
            my ($field, $value) = $line =~ /^([^:]*):? ?(.*)$/s;
            if    ($field eq 'event') { $type = $value }
            elsif ($field eq 'id')    { $id = $value }
            elsif ($field eq 'data')  { push @data, $value }
            elsif ($field eq 'retry') { $retry = $value / 1000 }
            elsif ($line eq '') {
                $last_id = $id;
                if (@data) { print $json->encode({ type => $type, id => $id, data => join("\n", @data) }), "\n" }
                ($type, @data) = ('message');
            }
        }
    };
    my %headers = $last_id ne '' ? ('Last-Event-ID' => $last_id) : ();
    my $answer = HTTP::Tiny->new(timeout => 60)->get($url, { headers => \%headers, data_callback => $take });
    print STDERR $answer->{content} if $answer->{status} == 599;
    print qq({"end":true}\n);
    select undef, undef, undef, $retry;
}
