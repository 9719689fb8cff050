// Answers a request of scores: its tensors are those of the arguments of a call, by name.
#pragma once

#include "requests.h"

void answer_scores(const requests::Request& request);
